"""A student begins beside its teacher's image tower, learns its features, and is saved as a matching model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AltCLIPModel

from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.training.config import MachineConfig, StageConfig
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.objectives import Batch, TeacherLearning
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
            return torch.nn.functional.normalize(student.get_text_features(student.token_ids(texts)), dim=-1)

    with torch.no_grad():
        taught = torch.nn.functional.normalize(
            student.text_projection(teacher.teach([pair[0] for pair in pairs])), dim=-1
        )
    found = features([pair[1] for pair in pairs]) @ taught.T
    assert found.argmax(dim=1).tolist() == [0, 1, 2] and found.diag().min() > 0.9


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
