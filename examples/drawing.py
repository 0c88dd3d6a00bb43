"""Every way to draw, on the embedded model: the pictures of docs/drawing.md, in the folder that is named (or here)."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from flagai_altdiff import GenerationRequest, generate, load_model

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
CAT, FOX = "a cat on a white background", "a fox on a white background"
ROCKET = "a rocket on a black background"
GAP = 4

model = load_model("AltDiffusion-mini")


def draw(prompt: str, **options: object) -> Image.Image:
    """One image, always from the same seed unless another is given."""
    return generate(model, GenerationRequest(prompts=(prompt,), **{"seed": 5, **options})).images[0]  # type: ignore[arg-type]


def beside(*images: Image.Image) -> Image.Image:
    """Images side by side."""
    width, height = sum(image.width + GAP for image in images) - GAP, max(image.height for image in images)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet


def save(name: str, *rows: list[Image.Image]) -> None:
    """Rows of images, one above the other."""
    strips = [beside(*row) for row in rows]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height + GAP for s in strips) - GAP), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    sheet.save(OUT / f"{name}.png")


OUT.mkdir(parents=True, exist_ok=True)
cat = draw(CAT)

save("from-a-picture", [cat, *(draw(FOX, init_image=cat, strength=s) for s in (0.4, 0.6, 0.8))])

strawberry = draw("strawberry, small, on the left, white background")
hole = Image.new("L", strawberry.size)
ImageDraw.Draw(hole).rectangle((68, 0, 128, 128), fill=255)
inside = {"init_image": strawberry, "mask_image": hole, "strength": 1, "seed": 6}
lemon = "lemon, small, on the right, white background"
save("into-a-picture", [strawberry, hole.convert("RGB"), draw(lemon, **inside)])
blue_lemon = "lemon, small, on the right, blue background"
save("soft-edge", [draw(blue_lemon, **inside, mask_feather=px) for px in (0, 8, 24)])
save("around-a-picture", [draw(CAT, init_image=cat, outpaint="left=64,right=64")])

long = {"width": 576, "window": 128, "window_overlap": 16}
save("long", [draw(ROCKET, **long)])
scroll = f"{CAT} | an octopus on a blue background | a strawberry on a yellow background"
save("stretches", [draw(scroll, **long, stretches=True)])
save("panorama", [draw("a palm tree on a blue background", **long, seamless="x")])

save("twice", [draw(ROCKET), draw(ROCKET, hires=2, hires_strength=0.2)])
seeds = range(11, 19)
unblue = [draw("a cat", seed=seed, negative_prompt="blue background") for seed in seeds]
save("without", [draw("a cat", seed=seed) for seed in seeds], unblue)
save("near", [draw(CAT, variation_seed=9, variation_strength=s) for s in (0, 0.1, 0.3, 1)])
samplers = ("ddim", "euler_ancestral", "dpmpp_2m", "unipc", "heun")
save("samplers", [draw(CAT, sampler=name, grid="trailing", steps=8) for name in samplers])
band = draw("a large blue star on a yellow background", seamless="x", seed=1)
wall = Image.new("RGB", (3 * band.width, band.height))
for i in range(3):
    wall.paste(band, (i * band.width, 0))
save("seamless", [band, wall])
print(f"the pictures lie in {OUT.resolve()}")
