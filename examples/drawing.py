"""Every way to draw, on the embedded model: the pictures of docs/drawing.md, in the folder that is named (or here)."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from flagai_altdiff import GenerationRequest, generate, load_model

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
HEART, STAR = "a red heart on a white background", "a blue star on a white background"
DISC = "a green circle on a white background"
GAP = 4

model = load_model("AltDiffusion-mini")


def draw(prompt: str, **options: object) -> Image.Image:
    """One image, always from the same seed unless another is given."""
    return generate(model, GenerationRequest(prompts=(prompt,), **{"seed": 5, **options})).images[0]  # type: ignore[arg-type]


def save(name: str, *images: Image.Image) -> None:
    """Images side by side."""
    width, height = sum(image.width + GAP for image in images) - GAP, max(image.height for image in images)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    sheet.save(OUT / f"{name}.png")


OUT.mkdir(parents=True, exist_ok=True)
heart = draw(HEART)

save("from-a-picture", heart, *(draw(STAR, init_image=heart, strength=s) for s in (0.4, 0.6, 0.8)))

hole = Image.new("L", heart.size)
ImageDraw.Draw(hole).ellipse((24, 24, 104, 104), fill=255)
inside = {"init_image": heart, "mask_image": hole, "strength": 1}
save("into-a-picture", heart, hole.convert("RGB"), draw(DISC, **inside))
save("soft-edge", *(draw(DISC, **inside, mask_feather=px) for px in (0, 8, 24)))
save("around-a-picture", draw(HEART, init_image=heart, outpaint="left=64,right=64"))

long = {"width": 576, "window": 128, "window_overlap": 16}
save("long", draw("a purple star on a black background", **long))
scroll = f"{HEART} | a yellow star on a blue background | {DISC}"
save("stretches", draw(scroll, **long, stretches=True))
save("panorama", draw("a yellow circle on a blue background", **long, seamless="x"))

save("twice", draw(HEART), draw(HEART, hires=2, hires_strength=0.4))
save("near", *(draw(HEART, variation_seed=9, variation_strength=s) for s in (0, 0.1, 0.3, 1)))
samplers = ("ddim", "euler_ancestral", "dpmpp_2m", "unipc", "heun")
save("samplers", *(draw(HEART, sampler=name, grid="trailing", steps=8) for name in samplers))
band = draw("a large blue star on a yellow background", seamless="x", seed=1)
wall = Image.new("RGB", (3 * band.width, band.height))
for i in range(3):
    wall.paste(band, (i * band.width, 0))
save("seamless", band, wall)
print(f"the pictures lie in {OUT.resolve()}")
