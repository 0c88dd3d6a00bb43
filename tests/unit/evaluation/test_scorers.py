"""What looks at images: the Inception network is torch-fidelity's, its file is checked, judges say what they see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.errors import CheckpointError, InvalidRequestError
from flagai_altdiff.evaluation.inception import Inception
from flagai_altdiff.evaluation.scorers import ClipSimilarity, load_features
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.matching import load_matching_model, match
from flagai_altdiff.mini.accuracy import questions
from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.scene_scorer import SceneScorer
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.phrases import phrase
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene
from tests import tiny


def inception_state() -> dict[str, Tensor]:
    """Random weights that keep numbers of order one."""
    with torch.device("meta"):
        shapes = Inception().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            state[key] = 1 + 0.3 * noise.abs()
        elif value.dim() == 1:
            state[key] = 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
        else:
            state[key] = noise * math.sqrt(2 / value[0].numel())
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(inception_state(), path)
    return path


def test_inception_is_torch_fidelitys(weights: Path) -> None:
    """Numbers that torch-fidelity 0.4.0 gives for the same weights and pixels."""
    pixels = (torch.arange(2 * 3 * 40 * 50) * 37 % 256).reshape(2, 3, 40, 50).byte()
    images = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    before = torch.get_rng_state()
    scorer = load_features(weights)
    assert torch.equal(torch.get_rng_state(), before)
    columns = scorer.score(images, ())
    assert columns["features"].shape == (2, 2048) and columns["logits"].shape == (2, 1008)
    wanted = [[0.00712006, 0.09228902, 0.23971611], [0.00681732, 0.09212729, 0.23918529]]
    torch.testing.assert_close(columns["features"][:, [0, 1000, 2047]], torch.tensor(wanted), rtol=1e-3, atol=1e-5)
    wanted = [[-0.31225547, -0.11854365, 0.14038491], [-0.31125900, -0.11847985, 0.14095917]]
    torch.testing.assert_close(columns["logits"][:, [0, 500, 1007]], torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    assert float(columns["features"].mean()) == pytest.approx(0.12595639, rel=1e-3)


def test_other_weights_are_told_with_the_command_that_gets_the_right_ones(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="curl -LO https://"):
        load_features(tmp_path / "gone.pth")
    state = inception_state()
    for name, change in {
        "other": {"a.weight": torch.ones(2)},
        "lacking": {key: value for key, value in state.items() if not key.startswith("Mixed_7c")},
        "untrained": {key: value for key, value in state.items() if not key.endswith("running_mean")},
        "small": {**state, "fc.weight": torch.ones(10, 2048)},
        "short": {**state, "Mixed_5b.branch1x1.bn.running_mean": torch.ones(3)},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(change, path)
        with pytest.raises(CheckpointError, match=str(path)):
            load_features(path)
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(CheckpointError):
        load_features(tmp_path / "page.pth")


def test_a_matching_model_gives_features_too(tmp_path: Path) -> None:
    folder = tiny.write_altclip_folder(tmp_path / "AltCLIP")
    scorer = load_features(folder)
    images = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    features = scorer.score(images, ())["features"]
    assert features.shape == (2, tiny.ALTCLIP_WIDTH) and not torch.allclose(features.norm(dim=1), torch.ones(2))
    assert "AltCLIP" in scorer.key


def test_similarity_is_to_the_english_caption(tmp_path: Path) -> None:
    model = load_matching_model(tiny.write_altclip_folder(tmp_path))
    images = [Image.effect_noise((40, 40), seed).convert("RGB") for seed in (20, 90)]
    prompts = [Prompt(id="1", text="一只猫", english=tiny.CAT), Prompt(id="2", text="eine Burg")]
    found = ClipSimilarity(model).score(images, prompts)["clip_similarity"]
    assert float(found[0]) == pytest.approx(float(match(model, [tiny.CAT], images[:1])), abs=1e-6)
    assert found[1].isnan()


def test_scenes_are_judged_in_every_language() -> None:
    pairs = {code: [(one.shown, one.prompt) for one in questions("shape", (), code, 2)] for code in ("en", "hi", "zh")}
    prompts = {language: [Prompt(id="", text=text) for _, text in own] for language, own in pairs.items()}
    prompts["en"].append(Prompt(id="", text="something else"))
    scorer = SceneScorer(prompts)
    assert scorer.known == 6
    import random

    for language, own in pairs.items():
        shapes = [scene for scene, _ in own if isinstance(scene, Scene)]
        images = [Image.fromarray(draw(scene, random.Random(0), side=128)) for scene in shapes]
        right = scorer.score(images, prompts[language][:2])["accuracy"]
        assert right.tolist() == [1, 1]
        assert scorer.score(images[::-1], prompts[language][:2])["accuracy"].tolist() == [0, 0]
    assert scorer.score(images[:1], prompts["en"][2:])["accuracy"].isnan().all()


def test_a_name_that_is_part_of_other_words_is_found() -> None:
    egg = next(thing for thing in known_things() if thing.names["de"] == "Ei")
    scene = ThingScene(code=egg.code, background="white", size="small")
    patterns = (None, *range(len(LANGUAGES["de"].patterns)))
    texts = {phrase(scene, "Ei", "de", pattern=pattern) for pattern in patterns}  # "… weißem …", "klein"
    assert SceneScorer({"de": [Prompt(id="", text=text) for text in texts]}).known == len(texts) > 2
