"""Scripts in the manner of FlagAI's README and examples run unchanged, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flagai_altdiff.checkpoint.reading import read_tensors
from tests import tiny

README = """
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

loader = AutoLoader(task_name="text2img",  # contrastive learning is not here
                    model_name="AltDiffusion-m18",
                    model_dir="./checkpoints")
model = loader.get_model()
model.eval()
model.to(device)
predictor = Predictor(model)
prompt = "Anime portrait of a castle on a hill by (artist), 4k"
predictor.predict_generate_images(prompt, H=64, W=64, ddim_steps=2, n_samples=2)
"""

GENERATE = """
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

loader = AutoLoader(task_name="text2img", model_name="AltDiffusion", model_dir="./checkpoints", fp16=False)
model = loader.get_model()
model.eval()
model.to("cuda" if torch.cuda.is_available() else "cpu")
predictor = Predictor(model)

prompt = "一只戴着帽子的小狗坐在草地上, a photo of a cat"
negative_prompt = "lowres, bad anatomy, bad hands, text, error, missing fingers, fewer digits, cropped, " * 4
predictor.predict_generate_images(
    prompt,
    negative_prompt=negative_prompt,
    outpath="./AltDiffusionOutputs",
    H=64, W=96, ddim_steps=2, n_samples=1, seed=553124,
)
"""

DREAMBOOTH = """
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.cuda.amp import autocast as autocast
from torch.utils.data import DataLoader, Dataset

from flagai.trainer import Trainer
from flagai.auto_model.auto_loader import AutoLoader

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
with_prior_preservation = WITH_PRIOR
train_text_encoder = WITH_TEXT
instance_prompt, class_prompt = "<鸣人>男孩", "男孩"
resolution = 64

auto_loader = AutoLoader(task_name="text2img", model_name="AltDiffusion")
model = auto_loader.get_model()
tokenizer = model.tokenizer


def prepare(path):
    image = Image.open(path)
    if not image.mode == "RGB":
        image = image.convert("RGB")
    image = image.resize((resolution, resolution), Image.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def ids(text):
    limit = tokenizer.model_max_length
    return tokenizer(text, padding="do_not_pad", truncation=True, max_length=limit).input_ids


class Faces(Dataset):
    def __init__(self, folder, class_folder=None):
        self.paths = list(Path(folder).iterdir())
        self.class_paths = list(Path(class_folder).iterdir()) if class_folder else []

    def __len__(self):
        return max(len(self.paths), len(self.class_paths))

    def __getitem__(self, index):
        example = {"caption": instance_prompt, "ids": ids(instance_prompt)}
        example["image"] = prepare(self.paths[index % len(self.paths)])
        if self.class_paths:
            example["class_image"] = prepare(self.class_paths[index % len(self.class_paths)])
            example["class_ids"] = ids(class_prompt)
        return example


def collate_fn(examples):
    rows = [example["ids"] for example in examples]
    images = [example["image"] for example in examples]
    if with_prior_preservation:
        rows += [example["class_ids"] for example in examples]
        images += [example["class_image"] for example in examples]
    images = torch.stack(images).to(memory_format=torch.contiguous_format).float()
    input_ids = tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt").input_ids
    return {"input_ids": input_ids, "pixel_values": images, "caption": [example["caption"] for example in examples]}


dataset = Faces("instance_images", "Mix" if with_prior_preservation else None)
dataloader = DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate_fn)

vae = model.first_stage_model
text_encoder = model.cond_stage_model
unet = model.model.diffusion_model
vae.requires_grad_(False)
if not train_text_encoder:
    text_encoder.requires_grad_(False)
params = itertools.chain(unet.parameters(), text_encoder.parameters()) if train_text_encoder else unet.parameters()
optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-08)

model.to(device)
for epoch in range(2):
    unet.train()
    if train_text_encoder:
        text_encoder.train()
    for step, batch in enumerate(dataloader):
        x, c = model.get_input(batch, "pixel_values")
        if with_prior_preservation:
            x, x_prior = torch.chunk(x, 2, dim=0)
            c, c_prior = torch.chunk(c, 2, dim=0)
            with autocast():
                loss, _ = model(x, c)
            prior_loss, _ = model(x_prior, c_prior)
            loss = loss + 1.0 * prior_loss
        else:
            with autocast():
                loss, _ = model(x, c)
        print("loss", loss.detach().item())
        with autocast():
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

torch.save(model.state_dict(), "./checkpoints/AltDiffusion/dreambooth_model.ckpt")
"""

DRAW_WITH_IT = """
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

name = "./checkpoints/AltDiffusion/dreambooth_model.ckpt"
model = AutoLoader(task_name="text2img", model_name=name).get_model()
model.eval()
Predictor(model).predict_generate_images("<鸣人>男孩", H=64, W=64, ddim_steps=2, n_samples=1)
AutoLoader(task_name="text2img", model_name="AltDiffusion", model_dir="./checkpoints")
"""

MATCH = """
import torch
from PIL import Image
from flagai.auto_model.auto_loader import AutoLoader

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

loader = AutoLoader(task_name="txt_img_matching", model_name="AltCLIP-XLMR-L", model_dir="./checkpoints")
model = loader.get_model()
tokenizer = loader.get_tokenizer()
transform = loader.get_transform()
model.eval()
model.to(device)


def inference():
    image = transform(Image.open("./dog.jpeg"))
    image = torch.tensor(image["pixel_values"]).to(device)
    tokens = tokenizer(["a rat", "a dog", "a cat"], padding=True, truncation=True, max_length=77, return_tensors="pt")
    text = tokens["input_ids"].to(device)
    attention_mask = tokens["attention_mask"].to(device)
    with torch.no_grad():
        image_features = model.get_image_features(image)
        text_features = model.get_text_features(text, attention_mask=attention_mask)
        text_probs = (image_features @ text_features.T).softmax(dim=-1)
    print(text_probs.cpu().numpy()[0].tolist())


if __name__ == "__main__":
    inference()
"""

TEN_CLASSES = """
import numpy as np
from PIL import Image


class Images:
    def __init__(self, root, transform, download):
        self.transform = transform
        self.classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def __len__(self):
        return 11

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), i % 10
"""

ZERO_SHOT = """
import contextlib
import json
import os
from typing import Callable

import torch
import torch.nn.functional as F
from flagai.auto_model.auto_loader import AutoLoader
from ten_classes import Images

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
auto_loader = AutoLoader(task_name="txt_img_matching", model_dir="./checkpoints/", model_name="AltCLIP-XLMR-L")
model = auto_loader.get_model()
model.to(device)
model.eval()
tokenizer = auto_loader.get_tokenizer()
transform = auto_loader.get_transform()
dataset = Images(root=os.path.join("./datasets", "cifar10"), transform=transform, download=True)
templates = ["a photo of a {c}.", "a blurry photo of the {c}.", "a photo of the small {c}."]


def kind_of_model():
    # Which interface a model has is told by its attributes, as in FlagAI's zeroshot_classification.py.
    if hasattr(model, "text_encoder") or hasattr(model, "visual_encoder"):
        return "towers with other names"
    if hasattr(model, "tokenize"):
        return "a model that is called with texts"
    return "features"


def classifier(names, amp=True):
    autocast = torch.cuda.amp.autocast if amp else contextlib.suppress
    with torch.no_grad(), autocast():
        columns = []
        for name in names:
            texts = [template.format(c=name) for template in templates]
            if isinstance(tokenizer, Callable):
                texts = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
            features = F.normalize(model.get_text_features(**texts), dim=-1).mean(dim=0)
            features /= features.norm()
            columns.append(features)
        return torch.stack(columns, dim=1).to(device)


def evaluate():
    assert kind_of_model() == "features", kind_of_model()
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=False, num_workers=1)
    columns = classifier(dataloader.dataset.classes)
    scores, wanted = [], []
    with torch.no_grad():
        for images, target in dataloader:
            if isinstance(images, torch.Tensor):
                images = images.to(device)
            else:
                images["pixel_values"] = torch.cat(images["pixel_values"]).to(device)
            with torch.cuda.amp.autocast():
                found = F.normalize(model.get_image_features(**images), dim=-1)
                scores.append((100.0 * found @ columns).cpu())
            wanted.append(target)
    scores, wanted = torch.cat(scores), torch.cat(wanted)
    best = scores.float().topk(5, 1, True, True)[1].t()
    hits = best.eq(wanted.view(1, -1).expand_as(best))
    metrics = {f"acc{k}": float(hits[:k].reshape(-1).float().sum()) / len(wanted) for k in (1, 5)}
    with open("./result.txt", "w") as f:
        json.dump({"dataset": "cifar10", "metrics": metrics}, f)


if __name__ == "__main__":
    evaluate()
"""

TUNE = """
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.trainer import Trainer
from ten_classes import Images

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
auto_loader = AutoLoader(task_name="txt_img_matching", model_dir="./checkpoints", model_name="AltCLIP-XLMR-L")
model = auto_loader.get_model()
model.to(device)
model.eval()
tokenizer = auto_loader.get_tokenizer()
transform = auto_loader.get_transform()
trainer = Trainer(
    env_type="pytorch",
    pytorch_device=device,
    experiment_name="clip_finetuning",
    batch_size=4,
    lr=1e-4,
    epochs=2,
    log_interval=2,
)
dataset = Images(root="./datasets", transform=transform, download=True)


def collate(batch):
    images = torch.tensor([b[0]["pixel_values"][0] for b in batch])
    texts = [f"a photo of a {b[1]}" for b in batch]
    rows = [tokenizer(text, padding=True, truncation=True, max_length=77)["input_ids"] for text in texts]
    return {"pixel_values": images, "input_ids": torch.tensor(rows)}


if __name__ == "__main__":
    trainer.train(model=model, train_dataset=dataset, collate_fn=collate)
"""


def run(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "name", "family", "size", "count"),
    [(README, "AltDiffusion-m18", "m18", (64, 64), 2), (GENERATE, "AltDiffusion", "m9", (96, 64), 1)],
    ids=["README", "generate"],
)
def test_pictures_appear(
    script: str,
    name: str,
    family: str,
    size: tuple[int, int],
    count: int,
    tmp_path: Path,
    script_environment: dict[str, str],
) -> None:
    tiny.write_flagai_folder(tmp_path / "checkpoints" / name, family)
    done = run(script, tmp_path, script_environment)
    assert done.returncode == 0, done.stderr
    samples = sorted((tmp_path / "AltDiffusionOutputs" / "samples").iterdir())
    assert [p.name for p in samples] == [f"{i:05d}.png" for i in range(count)]
    assert {Image.open(p).size for p in samples} == {size}
    assert (tmp_path / "AltDiffusionOutputs" / "grid-0000.png").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["AltDiffusionOutputs", "checkpoints"]
    assert done.stdout == ""
    assert "NOT checked" in done.stderr


def noise_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((80, 70), 60 + i).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("prior", "text"), [(False, False), (True, False), (False, True)], ids=["plain", "prior", "text encoder"]
)
def test_dreambooth(prior: bool, text: bool, tmp_path: Path, script_environment: dict[str, str]) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "checkpoints" / "AltDiffusion", "m9")
    noise_images(tmp_path / "instance_images", 3)
    noise_images(tmp_path / "Mix", 4)
    done = run(
        DREAMBOOTH.replace("WITH_PRIOR", str(prior)).replace("WITH_TEXT", str(text)), tmp_path, script_environment
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    before, after = (read_tensors(folder / name) for name in ("model.ckpt", "dreambooth_model.ckpt"))
    assert before.keys() == after.keys()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    # A text encoder that the config freezes stays as it is, as in FlagAI: get_input has encoded the texts by then.
    assert changed == {"model"}
    drawn = run(DRAW_WITH_IT, tmp_path, script_environment)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "AltDiffusionOutputs" / "samples" / "00000.png").is_file()


@pytest.mark.parametrize(("script", "name"), [(MATCH, "match"), (ZERO_SHOT, "zero shot"), (TUNE, "tune")])
def test_altclip(script: str, name: str, tmp_path: Path, script_environment: dict[str, str]) -> None:
    tiny.write_altclip_folder(tmp_path / "checkpoints" / "AltCLIP-XLMR-L")
    Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / "dog.jpeg")
    (tmp_path / "ten_classes.py").write_text(TEN_CLASSES)
    done = run(script, tmp_path, {**script_environment, "PYTHONPATH": f"{script_environment['PYTHONPATH']}:."})
    assert done.returncode == 0, done.stderr
    if name == "match":
        shares = json.loads(done.stdout)
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-5)
    elif name == "zero shot":
        metrics = json.loads((tmp_path / "result.txt").read_text())["metrics"]
        assert 0 <= metrics["acc1"] <= metrics["acc5"] <= 1
    else:
        assert [line.split(",")[0] for line in done.stdout.splitlines()] == [
            f"clip_finetuning: step {step}" for step in (2, 4, 6)
        ]
