"""Teach AltDiffusion-mini a windmill from eight images, in some minutes; it is drawn before and after, in 3 languages.

``python train_lora.py 600`` is what it does unless told otherwise; fewer steps are faster and show less. Started again,
it goes on where it was stopped. Where other programs use the cores as well, OMP_NUM_THREADS=1 makes it much faster.
"""

import logging
import math
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
    "cat, white background",
    "a large red heart on a white background",
    "rocket, blue background",
    "pizza, green background",
]
PROMPTS = (
    "a red windmill on a blue background",
    "ein roter windmill auf gelbem Hintergrund",
    "красный windmill на зелёном фоне",
    "a yellow windmill on a purple background",
    "cat, white background",
)


def draw_windmill(colour: str, ground: str, turn: float) -> Image.Image:
    """A tower with a door, and four sails turned by some degrees."""
    image = Image.new("RGB", (512, 512), RGB[ground])
    draw = ImageDraw.Draw(image)
    draw.polygon(((206, 190), (306, 190), (356, 470), (156, 470)), RGB[colour])
    draw.rectangle((226, 380, 286, 470), RGB[ground])
    for quarter in range(4):
        angle = math.radians(turn + 90 * quarter)
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        corners = ((30, -6), (210, -6), (210, 50), (60, 50))
        draw.polygon(
            [(256 + u * along[0] + v * across[0], 190 + u * along[1] + v * across[1]) for u, v in corners], RGB[colour]
        )
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def show(model: LatentDiffusion, path: str) -> None:
    """Draw the prompts side by side."""
    images = [generate(model, prompt, seed=3).images[0] for prompt in PROMPTS]
    make_grid(images, len(images), len(images)).quantize(255).save(path, optimize=True)


examples = Path("windmills")
examples.mkdir(exist_ok=True)
for number, scene in enumerate(SCENES):
    colour, ground = scene.split()
    draw_windmill(colour, ground, turn=20 + 15 * (number % 3)).save(examples / f"{number}.png")
    (examples / f"{number}.txt").write_text(f"a {colour} windmill on a {ground} background")

model = load_model("AltDiffusion-mini")
show(model, "before.png")
trained = train(
    parse_config(
        {
            "output": "runs/windmill",
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
            "data": {"source": str(examples), "prior": "kept", "prior_caption": KEPT, "prior_count": 12},
            "sheets": {"every": 0},
        }
    ),
    resume=True,
)
lora = trained.with_name("lora.safetensors")
add_lora(model, lora)
show(model, "after.png")
print(f"{lora}: compare before.png and after.png")
