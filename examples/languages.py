"""The same scene asked for in 18 languages: one image each, all from the same noise, side by side in one grid."""

from flagai_altdiff import Predictor, load_model
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene

scene = Scene(shape="star", colour="yellow", background="blue", size="large")
prompts = [caption(scene, code) for code in LANGUAGES]
result = Predictor(load_model("AltDiffusion-mini")).predict_generate_images(
    prompts, outpath="languages", n_samples=1, n_rows=6, fixed_code=True
)
for sample in result.samples:
    print(sample.path, sample.prompt)
print(result.grid_path)
