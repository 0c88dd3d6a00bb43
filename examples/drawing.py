"""Every way to draw, on the embedded model: the pictures of docs/drawing.md, in the folder that is named (or here)."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from flagai_altdiff import GenerationRequest, generate, load_model

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
CAT = "cat, red background"
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
cat = draw(CAT)

save("from-a-picture", cat, *(draw("tiger, red background", init_image=cat, strength=s) for s in (0.4, 0.6, 0.8)))

eye = Image.new("L", cat.size)
ImageDraw.Draw(eye).ellipse((24, 24, 104, 104), fill=255)
inside = {"init_image": cat, "mask_image": eye, "strength": 1}
save("into-a-picture", cat, eye.convert("RGB"), draw("pizza, red background", **inside))
save("soft-edge", *(draw("pizza, red background", **inside, mask_feather=px) for px in (0, 8, 24)))
save("around-a-picture", draw(CAT, init_image=cat, outpaint="left=64,right=64"))

long = {"width": 640, "window": 128, "window_overlap": 64}
save("long", draw("tree, green background", **long))
save("stretches", draw("cat, red background | rocket, blue background | tree, green background", **long, stretches=True))
save("panorama", draw("balloon, blue background", **long, seamless="x"))

save("twice", draw(CAT), draw(CAT, hires=2, hires_strength=0.4))
save("weights", *(draw(f"(cat:{w}), red background", prompt_syntax="weighted") for w in (0.4, 1.0, 1.6)))
save("near", *(draw(CAT, variation_seed=9, variation_strength=s) for s in (0, 0.1, 0.3, 1)))
samplers = ("ddim", "euler_ancestral", "dpmpp_2m", "unipc", "heun")
save("samplers", *(draw(CAT, sampler=name, grid="trailing", steps=8) for name in samplers))

tile = draw("flower, white background", seamless="xy")
wall = Image.new("RGB", (3 * tile.width, 2 * tile.height))
for i in range(6):
    wall.paste(tile, (i % 3 * tile.width, i // 3 * tile.height))
save("seamless", tile, wall)
print(f"the pictures lie in {OUT.resolve()}")
