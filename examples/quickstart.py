"""FlagAI's script for AltDiffusion, unchanged but for the model's name: images lie in ./AltDiffusionOutputs."""

import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

# Initialize
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

loader = AutoLoader(
    task_name="text2img",
    model_name="AltDiffusion-mini",  # or AltDiffusion, AltDiffusion-m9, AltDiffusion-m18
    model_dir="./checkpoints",
)
model = loader.get_model()
model.eval()
model.to(device)
predictor = Predictor(model)

for prompt in (
    "a large red heart on a white background",
    "蓝色背景上的黄色的大星星",
    "بيت أبيض كبير على خلفية خضراء",
    "большой фиолетовый цветок на жёлтом фоне",
):
    predictor.predict_generate_images(prompt, n_samples=2)
print("Your images are in ./AltDiffusionOutputs")
