"""The same thing asked for in 18 languages: one image each, all from the same noise, side by side in one grid."""

import sys

from flagai_altdiff import Predictor, load_model
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.vocabulary import LANGUAGES

name = sys.argv[1] if len(sys.argv) > 1 else "rocket"
thing = next((one for one in known_things() if one.names["en"] == name), None)
if thing is None:
    raise SystemExit(f"{name} is no thing that the model knows; things.json beside its weights lists them")
prompts = [thing.names[code] for code in LANGUAGES]
result = Predictor(load_model("AltDiffusion-mini")).predict_generate_images(
    prompts, outpath="languages", n_samples=1, n_rows=6, fixed_code=True
)
for sample in result.samples:
    print(sample.path, sample.prompt)
print(result.grid_path)
