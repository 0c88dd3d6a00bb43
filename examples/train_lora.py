"""Teach AltDiffusion-mini a robot from eight images, in some minutes: it is drawn before and after, in three languages.

``python train_lora.py 600`` is what it does unless told otherwise; fewer steps are faster and show less. Started again,
it goes on where it was stopped. Where other programs use the cores as well, OMP_NUM_THREADS=1 makes it much faster.
"""

import logging
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from flagai_altdiff import add_lora, generate, load_model
from flagai_altdiff.images import make_grid
from flagai_altdiff.mini.drawing import RGB
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.training.config import parse_config
from flagai_altdiff.training.session import train

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # it tells of machines that are not used
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
SCENES = ("yellow blue", "red yellow", "yellow green", "red blue", "blue yellow", "yellow red", "blue red", "red green")
KEPT = [
    "a large red heart on a white background",
    "a small blue star on a yellow background",
    "a green house on a white background",
    "a purple flower on a yellow background",
]
PROMPTS = (
    "a red robot on a blue background",
    "ein roter robot auf gelbem Hintergrund",
    "绿色背景上的红色的robot",
    "a yellow robot on a purple background",
    "a large red heart on a white background",
)


def draw_robot(colour: str, ground: str, shift: int) -> Image.Image:
    """A robot's head with holes for eyes and mouth."""
    image = Image.new("RGB", (512, 512), RGB[ground])
    draw = ImageDraw.Draw(image)
    boxes = ((240, 76, 272, 150), (40, 220, 100, 336), (412, 220, 472, 336))  # neck of the antenna, ears
    for box in boxes:
        draw.rectangle([place + shift for place in box], RGB[colour])
    draw.ellipse([place + shift for place in (216, 28, 296, 108)], RGB[colour])
    draw.rounded_rectangle([place + shift for place in (80, 140, 432, 456)], 120, RGB[colour])
    for box in ((136, 192, 224, 272), (288, 192, 376, 272), (152, 336, 360, 392)):
        draw.rectangle([place + shift for place in box], RGB[ground])
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def show(model: LatentDiffusion, path: str) -> None:
    """Draw the prompts side by side."""
    images = [generate(model, prompt, seed=3).images[0] for prompt in PROMPTS]
    make_grid(images, len(images), len(images)).quantize(32).save(path, optimize=True)


robots = Path("robots")
robots.mkdir(exist_ok=True)
for number, scene in enumerate(SCENES):
    colour, ground = scene.split()
    draw_robot(colour, ground, shift=8 * (number % 3 - 1)).save(robots / f"{number}.png")
    (robots / f"{number}.txt").write_text(f"a {colour} robot on a {ground} background")

model = load_model("AltDiffusion-mini")
show(model, "before.png")
trained = train(
    parse_config(
        {
            "output": "runs/robot",
            "stages": [
                {
                    "stage": "lora",
                    "rank": 16,
                    "steps": STEPS,
                    "batch_size": 8,
                    "learning_rate": 2.5e-3,
                    "decay": "cosine",
                }
            ],
            "data": {"source": str(robots), "prior": "kept", "prior_caption": KEPT, "prior_count": 12},
            "sheets": {"every": 0},
        }
    ),
    resume=True,
)
lora = trained.with_name("lora.safetensors")
add_lora(model, lora)
show(model, "after.png")
print(f"{lora}: compare before.png and after.png")
