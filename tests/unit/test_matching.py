"""AltCLIP: every layout loads, features are FlagAI's, scripts find what they call, and disagreement is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flagai_altdiff import AutoLoader
from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.errors import CheckpointError, ConfigError, HubError, OtherTaskError
from flagai_altdiff.matching import find_transform, load_matching_model, match
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.registry import MATCHING, MODELS
from tests import tiny
from tests.servers import serve

TEXTS = [tiny.CAT, tiny.SENTENCES[5], ""]


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def features(model: AltCLIP) -> Tensor:
    return match(model, TEXTS, [noise(1), noise(2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_altclip_folder(tmp_path_factory.mktemp("altclip") / "AltCLIP-XLMR-L")


def change_config(folder: Path, part: str | None, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", ["flagai", "huggingface"])
@pytest.mark.parametrize("safetensors", [False, True])
def test_every_layout_gives_the_same_features(layout: str, safetensors: bool, folder: Path, tmp_path: Path) -> None:
    other = tiny.write_altclip_folder(tmp_path / "m", layout, safetensors=safetensors)
    assert torch.equal(features(load_matching_model(other)), features(load_matching_model(folder)))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_joined(suffix: str, folder: Path, tmp_path: Path, no_network: None) -> None:
    own = tiny.write_altclip_folder(tmp_path / "AltCLIP-XLMR-L-m18", "huggingface")
    (own / "pytorch_model.bin").unlink()
    state = tiny.altclip_state()
    names = sorted(state)
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    shards = {f"{stem}-{i + 1:05}-of-00002{suffix}": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        weights = {key: state[key] for key in keys}
        save_file(weights, own / shard) if suffix == ".safetensors" else torch.save(weights, own / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (own / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    assert torch.equal(features(load_matching_model(own.name, tmp_path)), features(load_matching_model(folder)))
    (own / f"{stem}-00002-of-00002{suffix}").unlink()
    with pytest.raises(HubError, match=f"{stem}-00002-of-00002{suffix}"):
        load_matching_model(own.name, tmp_path)


def test_what_has_no_place_is_named_and_has_no_effect(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FlagAI leaves such weights out as well; files of its trainings have some."""
    state = {**tiny.altclip_state(), "text_model.encoder_tfm.weight": torch.ones(2, 2), "unknown\n": torch.ones(1)}
    other = load_matching_model(tiny.write_altclip_folder(tmp_path, state=state))
    assert torch.equal(features(other), features(load_matching_model(folder)))
    assert "have no effect: text_model.encoder_tfm.weight, unknown\\n" in caplog.text


def test_weights_of_another_file(folder: Path, tmp_path: Path) -> None:
    """As FlagAI's Trainer saves them, and as transformers spells the layers since 5.23."""
    loader = AutoLoader("txt_img_matching", "AltCLIP-XLMR-L", folder.parent)
    before = features(loader.get_model())
    state = {key: value * 1.5 if value.is_floating_point() else value for key, value in tiny.altclip_state().items()}
    renamed = {key.replace("encoder.layer.", "encoder.layers."): value for key, value in state.items()}
    renamed = {
        key.replace("vision_model.encoder.layers.", "vision_model.encoder.layer."): v for key, v in renamed.items()
    }
    found = []
    for name, weights in (("1000.bin", {"module": state}), ("renamed.bin", renamed)):
        torch.save(weights, tmp_path / name)
        loader.load_pretrain_params(tmp_path / name)
        found.append(features(loader.get_model()))
    assert torch.equal(*found) and not torch.allclose(found[0], before)
    torch.save({**renamed, **state}, tmp_path / "both.bin")
    with pytest.raises(CheckpointError, match="twice, under an old and a new name"):
        loader.load_pretrain_params(tmp_path / "both.bin")


@pytest.mark.parametrize("kind", ["flagai", "huggingface"])
def test_what_a_config_leaves_out_is_as_its_kind_has_it(kind: str, tmp_path: Path) -> None:
    config, _ = altclip_folder.read(tiny.write_altclip_folder(tmp_path, kind))
    sections = json.loads((tmp_path / "config.json").read_text())
    assert config.text.num_attention_heads == 2
    del sections["text_config"]["layer_norm_eps"]
    sections["text_config_dict"] = {**sections["text_config"], "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sections))
    config, _ = altclip_folder.read(tmp_path)
    assert config.text.num_attention_heads == 4
    assert config.text.layer_norm_eps == {"flagai": 1e-12, "huggingface": 1e-5}[kind]


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.task == MATCHING and spec.sources])
def test_a_registered_model_is_found_and_fetches_nothing(name: str, tmp_path: Path, no_network: None) -> None:
    tiny.write_altclip_folder(tmp_path / name)
    loader = AutoLoader(task_name="txt_img_matching", model_name=name.lower(), model_dir=tmp_path)
    assert loader.get_model().spec is MODELS[name]


def test_the_calls_of_flagais_scripts(folder: Path) -> None:
    loader = AutoLoader("txt_img_matching", "AltCLIP-XLMR-L", str(folder.parent))
    model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()
    model.eval()
    model.to(torch.device("cpu"))
    assert tokenizer is not None
    pixels = torch.tensor(np.array(transform(noise(1).convert("L"))["pixel_values"]))
    assert pixels.shape == (1, 3, 28, 28) and pixels.dtype == torch.float32
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        images = model.get_image_features(pixels)
        texts = model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        assert torch.equal(texts, model.get_text_features(**tokens))
        assert (images @ texts.T).softmax(dim=-1).shape == (1, 3)
        assert model.encode(TEXTS, tokenizer).shape == (3, 77, 40)
    text, image = torch.nn.functional.normalize(texts), torch.nn.functional.normalize(images)
    assert torch.allclose(match(model, TEXTS, [noise(1).convert("L")]), text @ image.T, atol=1e-6)


def test_forward_has_the_eight_keys_and_a_loss_that_learns(folder: Path) -> None:
    model = load_matching_model(folder)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    batch = {
        **tokenizer(TEXTS, padding=True, return_tensors="pt"),
        **model.transform([noise(i) for i in range(3)], return_tensors="pt"),
    }
    output = model(**batch)
    assert set(output) == {
        *("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
        *("text_model_output", "vision_model_output", "logits"),
    }
    for tower in ("text_model_output", "vision_model_output"):
        assert output[tower]["pooler_output"] is output[tower][1] is output[tower].pooler_output
    assert torch.equal(output["logits_per_image"], output["logits_per_text"].T)
    assert torch.equal(output["logits"], torch.cat([output["image_embeds"], output["text_embeds"]], dim=-1))
    assert torch.allclose(output["text_embeds"].norm(dim=-1), torch.ones(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output["loss"].backward()
    optimizer.step()
    assert model(**batch)["loss"] < output["loss"]
    fewer = model(input_ids=batch["input_ids"][:2], pixel_values=batch["pixel_values"])
    assert fewer["loss"] is None and fewer["logits_per_text"].shape == (2, 3)


class Pictures(Dataset[tuple[Any, int]]):
    """As torchvision's datasets are: a prepared image and its class."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(noise(i)), i % 2


def test_what_the_transform_gives_survives_a_dataloader(folder: Path) -> None:
    model = load_matching_model(folder)
    shapes = []
    for images, labels in DataLoader(Pictures(model.transform), batch_size=2):
        pixels = images["pixel_values"][0]
        shapes.append((tuple(pixels.shape), len(labels)))
        assert model.get_image_features(pixels).shape == (len(labels), tiny.ALTCLIP_WIDTH)
    assert shapes == [((2, 3, 28, 28), 2), ((2, 3, 28, 28), 2), ((1, 3, 28, 28), 1)]


def test_a_text_does_not_depend_on_its_neighbours(folder: Path) -> None:
    model = load_matching_model(folder)
    together = match(model, TEXTS, [noise(1)])
    alone = torch.cat([match(model, [text], [noise(1)]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)
    assert match(model, [], [noise(1)]).shape == (0, 1) and match(model, TEXTS, []).shape == (3, 0)


def test_sizes_come_from_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FlagAI's configs say 768 where the weights have 1024, and patches of 32 for some of 14."""
    right = tiny.write_altclip_folder(tmp_path / "right")
    wrong = tiny.write_altclip_folder(tmp_path / "wrong", text={"project_dim": 768})
    change_config(wrong, "vision_config", patch_size=32, image_size=224)
    change_config(wrong, None, projection_dim=768)
    assert torch.equal(features(load_matching_model(wrong)), features(load_matching_model(right)))
    message = caplog.text
    assert "projection_dim=768, it is 24" in message and "patch_size=32, it is 14" in message


def test_the_read_out_before_the_last_layer(tmp_path: Path) -> None:
    """The released m18 may have its weights; FlagAI ignores them unless the config asks for them."""
    state = tiny.altclip_state(has_pre_transformation=True)
    silent = load_matching_model(tiny.write_altclip_folder(tmp_path / "silent", state=state))
    asked = tiny.write_altclip_folder(tmp_path / "asked", state=state, text={"has_pre_transformation": True})
    asking = load_matching_model(asked)
    assert torch.equal(features(silent), features(asking))
    states = [model.encode(TEXTS, model.tokenizer) for model in (silent, asking)]
    assert states[0].shape == states[1].shape and not torch.allclose(states[0], states[1], atol=0.1)


@pytest.mark.parametrize("says", [True, False])
def test_a_config_and_weights_that_disagree_are_refused(says: bool, tmp_path: Path) -> None:
    state = tiny.altclip_state(has_pre_transformation=not says)
    folder = tiny.write_altclip_folder(tmp_path, state=state, text={"has_pre_transformation": says})
    with pytest.raises(CheckpointError, match="transformation_pre"):
        load_matching_model(folder)


def test_other_models_are_named(folder: Path, tmp_path: Path, m9_folder: Path) -> None:
    with pytest.raises(OtherTaskError, match=r"another task, 'text2img'.*AltCLIP-XLMR-L"):
        load_matching_model("AltDiffusion-m9")
    with pytest.raises(OtherTaskError, match=r"another task, 'txt_img_matching'.*AltDiffusion-mini"):
        AutoLoader("text2img", "AltCLIP-XLMR-L", folder.parent)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_matching_model(m9_folder)
    clip = {
        key.replace("text_model.roberta", "text_model.encoder"): value for key, value in tiny.altclip_state().items()
    }
    with pytest.raises(CheckpointError, match="no XLM-R text tower"):
        load_matching_model(tiny.write_altclip_folder(tmp_path / "clip", state=clip))
    other = tiny.write_altclip_folder(tmp_path / "other", text={"hidden_act": "gelu_new"})
    with pytest.raises(ConfigError, match="hidden_act='gelu_new'"):
        load_matching_model(other)
    bert = tiny.write_altclip_folder(tmp_path / "bert")
    change_config(bert, None, model_type="chinese_clip")
    with pytest.raises(ConfigError, match="model_type='chinese_clip'"):
        load_matching_model(bert)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_model.embeddings.patch_embedding.weight", torch.zeros(3), r"patch_embedding.* has the shape \[3\]"),
        ("vision_model.embeddings.position_embedding.weight", torch.ones(7, 32), "7 positions are no square"),
        ("text_projection.weight", torch.tensor(1.0), "text_projection"),
        ("text_model.transformation.weight", torch.zeros(0, 128), "text_model.transformation"),
        ("visual_projection.weight", torch.ones(24, 31), "visual_projection"),
        ("text_model.roberta.encoder.layer.1.output.dense.weight", None, "1 missing keys"),
        (
            "text_model.roberta.embeddings.position_embeddings.weight",
            torch.ones(78, 128),
            "78 rows; expected 79 for 77",
        ),
    ],
)
def test_weights_that_are_none_are_named(key: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
    state = {k: v for k, v in {**tiny.altclip_state(), key: value}.items() if v is not None}
    folder = tiny.write_altclip_folder(tmp_path, state=state)
    with pytest.raises(CheckpointError, match=message):
        load_matching_model(folder)


def test_another_preparation_than_clips_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny.write_altclip_folder(tmp_path)
    nan, side = float("nan"), {"height": 28, "width": 28}
    for field, value in (
        *(("do_center_crop", False), ("do_rescale", False), ("rescale_factor", 1.0), ("resample", 2)),
        *(("image_mean", [0.5]), ("image_mean", [nan] * 3), ("image_mean", [True] * 3), ("image_mean", [10**400] * 3)),
        *(("image_std", [1, 0, 1]), ("image_std", "0.5"), ("size", {"a": 1}), ("size", side), ("size", 20)),
        *(("crop_size", {**side, "width": 9}), ("crop_size", [28]), ("crop_size", True), ("crop_size", 10**9)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 28, field: value}))
        with pytest.raises(ConfigError, match=field):
            find_transform(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert torch.equal(features(load_matching_model(tmp_path)), features(load_matching_model(folder)))


def test_the_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_altclip_folder(tmp_path, state=tiny.altclip_state(vocab_size=100))
    with pytest.raises(CheckpointError, match="belong to different models"):
        load_matching_model(folder)


def test_only_the_config(folder: Path) -> None:
    loader = AutoLoader("txt_img_matching", "AltCLIP-XLMR-L", folder.parent, only_download_config=True)
    assert loader.get_tokenizer() is not None
    assert np.asarray(loader.get_transform()(noise(1))["pixel_values"]).shape == (1, 3, 28, 28)
    with pytest.raises(CheckpointError, match="only_download_config"):
        loader.get_model()


@pytest.mark.parametrize("source", ["baai", "huggingface"])
def test_a_model_that_is_missing_is_fetched(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.write_altclip_folder(tmp_path / "theirs", "flagai" if source == "baai" else "huggingface")
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    held = (
        {"models": {"AltCLIP-XLMR-L-m9": files}} if source == "baai" else {"repositories": {"BAAI/AltCLIP-m9": files}}
    )
    with serve(**held) as running:  # type: ignore[arg-type]
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        fetched = AutoLoader("txt_img_matching", "AltCLIP-XLMR-L-m9", tmp_path / "checkpoints").get_model()
    assert torch.equal(features(fetched), features(load_matching_model(whole)))
