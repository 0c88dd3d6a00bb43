"""The native calls: a prompt, a look at every fifth step, an image with its own seed."""

from PIL import Image

from flagai_altdiff import generate, load_model
from flagai_altdiff.images import to_pil
from flagai_altdiff.sampling import Step

model = load_model("AltDiffusion-mini")
previews: list[Image.Image] = []


def look(step: Step) -> None:
    """Keep what the sampler believes the finished image to be."""
    if step.index % 5 == 0:
        previews.extend(to_pil(model.decode_first_stage(step.pred_x0)))


result = generate(model, "ein Schmetterling auf weißem Hintergrund", sampler="dpmpp_2m", seed=7, callback=look)
for i, image in enumerate([*previews, *result.images]):
    image.save(f"preview-{i}.png")
print(f"{len(previews)} previews and the image of seed {result.seeds[0]} in {result.seconds:.1f} s")
