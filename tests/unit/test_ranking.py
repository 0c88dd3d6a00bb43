"""Of many images the best are kept, the best first, and an interrupted choice goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flagai_altdiff import GenerationRequest, Output, draw_to_folder
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.images import read_texts
from flagai_altdiff.matching import load_matching_model, match
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.pipeline import GenerationResult, generate
from flagai_altdiff.ranking import BestOf
from flagai_altdiff.sampling import Step
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 1, "seed": 5, "images_per_prompt": 5, "batch_size": 2}
PROMPTS = (tiny.CAT, tiny.CASTLE)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> AltCLIP:
    return load_matching_model(tiny.write_altclip_folder(tmp_path_factory.mktemp("judge") / "tiny-judge"))


def draw(model: LatentDiffusion, judge: AltCLIP, folder: Path, best: int = 2, **changes: Any) -> GenerationResult:
    output = Output(folder=folder, **{name: changes.pop(name) for name in ("resume", "skip_save") if name in changes})
    callback = changes.pop("callback", None)
    request = GenerationRequest(prompts=PROMPTS, **{**SMALL, **changes})
    return draw_to_folder(model, request, output, best_of=BestOf(judge=judge, best=best), callback=callback)


def test_the_best_are_kept_and_come_first(m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path) -> None:
    result = draw(m9, judge, tmp_path)
    everything = generate(m9, PROMPTS, **SMALL)
    expected: list[int] = []
    for i, prompt in enumerate(PROMPTS):
        fits = match(judge, [prompt], everything.images[5 * i : 5 * i + 5])[0]
        order = fits.argsort(descending=True).tolist()[:2]
        expected += [5 * i + j for j in order]
        found = [sample.fit.similarity for sample in result.samples[2 * i : 2 * i + 2] if sample.fit]
        assert found == pytest.approx([float(fits[j]) for j in order], abs=1e-4)
    assert [sample.index for sample in result.samples] == expected
    assert [s.fit and s.fit.rank for s in result.samples] == [1, 2, 1, 2]
    assert [path.name for path in result.paths] == [f"{i:05d}.png" for i in range(4)]
    for sample in result.samples:
        assert sample.image.tobytes() == everything.images[sample.index].tobytes()
        assert sample.path is not None
        record = json.loads(read_texts(sample.path)["flagai_altdiff"])
        assert sample.fit is not None
        assert record["fit"] == {
            "judge": "tiny-judge",
            "similarity": sample.fit.similarity,
            "rank": sample.fit.rank,
            "of": 5,
        }


@pytest.mark.parametrize("stopped_at", [2, 4, 5])
def test_an_interrupted_choice_goes_on(stopped_at: int, m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path) -> None:
    steps: list[Step] = []

    def stop(step: Step) -> None:
        steps.append(step)
        if len(steps) == stopped_at:
            raise KeyboardInterrupt

    whole = draw(m9, judge, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        draw(m9, judge, tmp_path / "cut", callback=stop)
    again = draw(m9, judge, tmp_path / "cut", resume=True)
    assert [(s.index, s.fit) for s in again.samples] == [(s.index, s.fit) for s in whole.samples]
    assert [s.image.tobytes() for s in again.samples] == [s.image.tobytes() for s in whole.samples]
    assert len([*(tmp_path / "cut" / "samples").iterdir()]) == 4


def test_another_choice_is_another_run(m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path) -> None:
    draw(m9, judge, tmp_path, best=3)
    assert len(draw(m9, judge, tmp_path, best=1, resume=True).samples) == 2
    assert len([*(tmp_path / "samples").iterdir()]) == 8


def test_another_judge_of_the_same_name_is_another_run(m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path) -> None:
    state = {
        key: value.flip(0) if key == "text_projection.weight" else value for key, value in tiny.altclip_state().items()
    }
    other = load_matching_model(tiny.write_altclip_folder(tmp_path / judge.name, state=state))
    draw(m9, judge, tmp_path)
    chosen = [sample.fit for sample in draw(m9, other, tmp_path, resume=True).samples]
    assert chosen == [sample.fit for sample in draw(m9, other, tmp_path / "new").samples]


@pytest.mark.parametrize(("best", "drawn"), [(5, 5), (0, 5), (-1, 5), (1, 1)])
def test_a_choice_among_nothing_is_refused(
    best: int, drawn: int, m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError):
        draw(m9, judge, tmp_path, best=best, images_per_prompt=drawn, callback=lambda step: pytest.fail("it drew"))
    assert [*tmp_path.iterdir()] == []
