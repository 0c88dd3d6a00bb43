"""A student begins beside its teacher's image tower, learns its features, and is saved as a matching model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AltCLIPModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import MachineConfig, StageConfig
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.objectives import Batch, TeacherLearning, contrastive_losses
from flagai_altdiff.training.run import fit
from flagai_altdiff.training.teacher import Teacher, load_teacher, new_student
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def teacher(clip_folder: Path) -> Teacher:
    return load_teacher(clip_folder)


def test_a_student_learns_what_its_teacher_says(teacher: Teacher, xlmr_folder: Path, tmp_path: Path) -> None:
    student = new_student(teacher, xlmr_folder, torch.Generator().manual_seed(1))
    pairs = [("a red cat", tiny.SENTENCES[5]), ("a house", tiny.SENTENCES[6]), ("the sea", tiny.SENTENCES[1])]

    def load(first: int, rank: int, world: int) -> Iterator[Batch]:
        while True:
            english, other = zip(*pairs, strict=True)
            yield {"english": english, "caption": other, "epoch": 0, "position": torch.arange(3)}

    settings = StageConfig(stage="teacher", steps=150, batch_size=3, learning_rate=1e-3, warmup_steps=5).settings(28)
    training = StageTraining(TeacherLearning(student, teacher.teach, settings), settings, load)
    fit(training, tmp_path / "run", save_every=1000, machine=MachineConfig(accelerator="cpu"))

    def features(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return normalize(student.get_text_features(student.token_ids(texts)), dim=-1)

    with torch.no_grad():
        taught = normalize(student.text_projection(teacher.teach([pair[0] for pair in pairs])), dim=-1)
    found = features([pair[1] for pair in pairs]) @ taught.T
    assert found.argmax(dim=1).tolist() == [0, 1, 2] and found.diag().min() > 0.9


@pytest.mark.parametrize("loss", ["mse", "cosine", "contrastive"])
def test_every_loss_makes_the_features_alike(loss: str, teacher: Teacher, xlmr_folder: Path, tmp_path: Path) -> None:
    student = new_student(teacher, xlmr_folder, torch.Generator().manual_seed(1))
    english = ["a red cat", "a house", "the sea", "the moon"]
    other = [tiny.SENTENCES[place] for place in (5, 6, 1, 2)]

    def load(first: int, rank: int, world: int) -> Iterator[Batch]:
        while True:
            yield {"english": english, "caption": other, "epoch": 0, "position": torch.arange(4)}

    stage = StageConfig(stage="teacher", steps=60, batch_size=4, learning_rate=1e-3, warmup_steps=5, loss=loss)  # type: ignore[arg-type]
    settings = stage.settings(28)
    training = StageTraining(TeacherLearning(student, teacher.teach, settings), settings, load)
    fit(training, tmp_path / "run", save_every=1000, machine=MachineConfig(accelerator="cpu"))
    with torch.no_grad():
        found = normalize(student.text_model.pooled(student.token_ids(other))[1], dim=-1)
    near = found @ normalize(teacher.teach(english), dim=-1).T
    assert near.argmax(dim=1).tolist() == [0, 1, 2, 3]
    curve = [row["loss"] for row in read_log(tmp_path / "run" / "log.csv")]
    assert curve[-1] < 0.5 * curve[0]


def test_texts_are_compared_with_those_of_all_processes(teacher: Teacher, xlmr_folder: Path) -> None:
    texts, others = normalize(torch.randn(2, 5, 8), dim=-1)
    scale = torch.tensor(3.0)
    whole = contrastive_losses(texts, others, scale, lambda value: (value, 0))
    for first, last in ((0, 2), (2, 5), (5, 5)):
        gather = partial(_of_all, iter((texts, others)), first)
        part = contrastive_losses(texts[first:last], others[first:last], scale, gather)
        torch.testing.assert_close(part, whole[first:last])
    # A process without a text takes part, and its gradients are awaited.
    student = new_student(teacher, xlmr_folder, torch.Generator().manual_seed(1))
    learning = TeacherLearning(student, teacher.teach, StageConfig(stage="teacher", loss="contrastive").settings(28))
    asked = iter((torch.randn(2, 32), torch.randn(2, 32)))
    losses = learning({"english": [], "caption": []}, partial(_of_all, asked, 2))
    assert losses.shape == (0,) and losses.requires_grad and not list(asked)


def _of_all(rows: Iterator[Tensor], first: int, value: Tensor) -> tuple[Tensor, int]:
    """What another process has with it."""
    return next(rows), first


def test_other_towers_teach_too(clip_folder: Path, tmp_path: Path) -> None:
    """Of other lengths, without an image tower; not those that say nothing of a whole text, or lack weights."""
    words = len(AutoTokenizer.from_pretrained(clip_folder))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": words, "max_position_embeddings": 16}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    towers: dict[str, PreTrainedModel] = {
        "clip": CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=words - 2, eos_token_id=words - 1)),
        "siglip": SiglipModel(SiglipConfig(text_config={**sizes, "projection_size": 32}, vision_config=image)),
        "bert": BertModel(BertConfig(**sizes)),
        "bare": BertModel(BertConfig(**sizes), add_pooling_layer=False),
    }
    for name, tower in towers.items():
        tower.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path / name)
        if name == "bare":
            with pytest.raises(CheckpointError, match=r"lacks 2 weights of its model, pooler\.dense"):
                load_teacher(tmp_path / name)
        else:
            said = load_teacher(tmp_path / name).teach(["a cat", "a long story " * 20])
            assert said.shape[0] == 2 and said.isfinite().all() and not torch.equal(said[0], said[1])


def test_what_a_student_is_saved_as_opens_here_and_in_transformers(
    teacher: Teacher, xlmr_folder: Path, tmp_path: Path
) -> None:
    student = new_student(teacher, xlmr_folder, torch.Generator().manual_seed(1))
    assert student.text_tokenizer is not None
    altclip_folder.write(tmp_path / "m", student.config, student.state_dict(), student.text_tokenizer.files)
    again, theirs = load_matching_model(tmp_path / "m"), AltCLIPModel.from_pretrained(tmp_path / "m").eval()
    pixels, ids = torch.randn(2, 3, 28, 28), student.token_ids([tiny.CAT, ""])
    with torch.no_grad():
        assert torch.equal(again.get_text_features(ids), student.get_text_features(ids))
        expected = theirs(input_ids=ids, attention_mask=(ids != 1).long(), pixel_values=pixels)
        found = again(ids, pixels)
    torch.testing.assert_close(found["logits_per_image"], expected.logits_per_image, rtol=1e-4, atol=1e-4)
    pooled = teacher.model.vision_model(pixels).pooler_output
    torch.testing.assert_close(again.vision_model(pixels)[1], pooled, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="exists"):
        altclip_folder.write(tmp_path / "m", student.config, student.state_dict(), ())


def test_what_cannot_teach_or_learn_is_named(
    teacher: Teacher, xlmr_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_teacher(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        new_student(teacher, tmp_path, torch.Generator())
    with pytest.raises(CheckpointError, match="no image tower"):
        new_student(
            Teacher(folder=clip_folder, model=teacher.model.text_model, tokenizer=teacher.tokenizer),
            xlmr_folder,
            torch.Generator(),
        )
