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

result = predictor.predict_generate_images(
    [
        "a cat on a red background",
        "气球，蓝色背景",
        "ракета на чёрном фоне",
        "una pizza, fondo verde",
        "تفاحة حمراء",
        "기타",
    ],
    n_samples=2,
    n_rows=4,
)
for sample in result.samples:
    print(sample.path, sample.prompt)
print(f"Your images are in ./AltDiffusionOutputs; all of them on one sheet: {result.grid_path}")
