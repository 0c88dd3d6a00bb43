"""Questions to a model: about what training saw and what it never did; and how answers are counted."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from flagai_altdiff.mini.accuracy import KINDS, Answers, as_table, measure, questions
from flagai_altdiff.mini.captions import with_an
from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.judge import CODES, SEEN, UNTOLD, Judge, right_answers, see
from flagai_altdiff.mini.pairs import measure_pairs, pair_questions
from flagai_altdiff.mini.recipe.corpus import telling_words
from flagai_altdiff.mini.things.asking import ASKING
from flagai_altdiff.mini.things.catalogue import Thing, known_things
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene, is_held_out
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate


@pytest.mark.parametrize("language", ["en", "de", "zh"])
@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_of_their_kind(kind: str, language: str) -> None:
    things = known_things()[::10]
    asked = questions(kind, things, language, 50)
    assert asked == questions(kind, things, language, 50) and len(questions(kind, things, language, 2)) <= 2
    by_code = {thing.code: thing for thing in things}
    assert asked
    for one in asked:
        assert one.prompt and set(one.asked) <= set(SEEN) and one.asked[0] == "what"
        if isinstance(one.shown, Scene):
            assert kind == "shape" and is_held_out(one.shown)
            continue
        thing = by_code[one.shown.code]
        if kind.endswith(" word"):
            words = {"further": thing.words, "shared": thing.shared_words, "unseen": thing.unseen_words}
            assert one.prompt in words[kind.removesuffix(" word")][language]
        else:
            assert thing.names[language] in one.prompt
        assert one.shown.ground_is_held_out is (kind == "unseen ground") or kind not in ("ground", "unseen ground")
        assert one.shown.style_is_held_out is (kind == "unseen style") or kind not in ("style", "unseen style")
        assert (one.prompt == thing.names[language]) is (kind == "name") or kind.endswith(" word")
        if kind == "unseen asking":
            patterns = ASKING[language].unseen
            assert one.prompt in [with_an(pattern.format(thing.names[language]), language) for pattern in patterns]


def test_right_answers_leave_open_what_there_is_not() -> None:
    shape = Scene(shape="star", colour="red", background="blue")
    thing = ThingScene(code=CODES[3], background="blue", style="flat", size="small", position="left")
    by_name = [dict(zip(SEEN, right_answers(scene), strict=True)) for scene in (shape, thing)]
    assert by_name[0]["style"] == UNTOLD and by_name[1]["colour"] == UNTOLD
    assert SEEN["what"][by_name[0]["what"]] == "star" and SEEN["what"][by_name[1]["what"]] == CODES[3]
    assert [SEEN[name][by_name[1][name]] for name in ("background", "size", "position", "style")] == [
        "blue",
        "small",
        "left",
        "flat",
    ]
    assert len(set(CODES)) == len(CODES)


def test_a_model_is_measured(m9: LatentDiffusion, things: tuple[Thing, ...]) -> None:
    torch.manual_seed(0)
    asked = questions("ground", things, "en", 3)
    right = measure(m9, asked, judge=Judge().eval(), steps=1, batch_size=2)
    assert right.keys() == {"what", "background"} and all(values.shape == (len(asked),) for values in right.values())


def test_pairs_are_right_where_both_are_among_the_likeliest(
    m9: LatentDiffusion, things: tuple[Thing, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pair_questions(things, "zh", 3)
    assert asked == pair_questions(things, "zh", 3)
    names = {thing.code: thing.names["zh"] for thing in things}
    assert all(one.prompt == "，".join(names[code] for code in one.codes) for one in asked)
    assert all(one.codes[0] != one.codes[1] for one in asked)
    eye = Judge().eval()
    likeliest = torch.zeros(len(SEEN["what"]))
    likeliest[SEEN["what"].index(asked[0].codes[1])] = 9
    monkeypatch.setattr(eye.heads["what"], "forward", lambda features: likeliest.repeat(len(features), 1))
    monkeypatch.setattr("flagai_altdiff.mini.pairs.generate", partial(generate, steps=1))
    assert measure_pairs(m9, asked[:1], judge=eye).tolist() == [[False, True]]


def test_answers_are_counted_with_their_intervals() -> None:
    answers = [
        Answers(kind="ground", language=code, right={"what": torch.tensor([True] * n + [False] * (10 - n))})
        for code, n in (("en", 9), ("de", 5))
    ]
    share = answers[0].shares()["what"]
    assert share.value == pytest.approx(0.9) and share.low is not None and share.low < 0.9 and share.count == 10
    table = as_table(answers).splitlines()
    assert table[2] == "| English (en) | 90 |" and table[-1].startswith("| **all** | 70.0 ± ")


def test_words_that_tell_a_thing_alone(things: tuple[Thing, ...]) -> None:
    """ "hot" and "beverage" do; the language's code, which ends every name here, does not."""
    found = telling_words(things)
    assert set(found["2615", "en"]) == {"beverage", "hot"}
    assert all("en" not in words for (_, language), words in found.items() if language == "en")
    for thing in things:
        for language in LANGUAGES:
            assert not set(found.get((thing.code, language), ())) & set(thing.unseen_words[language])


def test_the_judge_reads_every_image() -> None:
    torch.manual_seed(0)
    scenes = [Scene(shape="star", colour="red", background="blue")] * 3
    images = torch.stack([torch.from_numpy(draw(scene, random.Random(0))).permute(2, 0, 1) for scene in scenes])
    found = see(Judge().eval(), images.float() / 127.5 - 1)
    assert found.shape == (3, len(SEEN)) and (found == found[0]).all()
