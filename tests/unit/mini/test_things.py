"""Things: their packages are what they must be, their names their own, and training never sees what is held out."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flagai_altdiff.errors import DataError, MissingDependencyError
from flagai_altdiff.mini.recipe.corpus import make_corpus
from flagai_altdiff.mini.recipe.pictures import read_pictures
from flagai_altdiff.mini.things import packages
from flagai_altdiff.mini.things.catalogue import FILE, Thing, is_unseen, make_catalogue, read_catalogue, write_catalogue
from flagai_altdiff.mini.things.chosen import THINGS
from flagai_altdiff.mini.things.composing import ThingScene, compose, random_scene
from flagai_altdiff.mini.things.packages import NAMES, NOTO, Package, fetch
from flagai_altdiff.mini.things.phrases import phrase, random_phrase
from flagai_altdiff.mini.things.shards import REPORT, Amount, write_things
from flagai_altdiff.mini.things.sprites import STYLES, make_sprites
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES, POSITIONS
from flagai_altdiff.mini.world import Scene, is_held_out
from flagai_altdiff.training.data.opening import open_examples
from tests.things import CODES, OWN_WORDS, names, pack

Archives = dict[Package, Path]


def write_names(path: Path, changed: dict[str, dict[str, Any]]) -> Path:
    """An archive of names with the records of some languages changed."""
    records = {language: names(language, CODES[:3]) for language in LANGUAGES} | changed
    files = {
        f"annotations/{language}/annotations.json": json.dumps({"annotations": {"annotations": entries}}).encode()
        for language, entries in records.items()
    }
    pack(path, files)
    return path


def test_the_chosen_things_are_many_and_each_is_there_once() -> None:
    codes = [code for some in THINGS.values() for code in some]
    assert len(codes) == len(set(codes)) > 500


def test_every_thing_has_its_names_and_words(things: tuple[Thing, ...]) -> None:
    cat = things[0]
    assert (cat.code, cat.sign, cat.names["de"]) == ("1f408", "🐈", "cat de")
    for thing in things:
        for language in LANGUAGES:
            seen, unseen = thing.words[language], thing.unseen_words[language]
            assert not set(seen) & set(unseen) and "drawing" not in seen + unseen, "it belongs to all of them"
            assert len(seen) + len(unseen) == OWN_WORDS + 1
            assert thing.shared_words[language] == (("drawing",) if thing is cat else ()), "the shortest name"
            assert all(is_unseen(language, word) for word in unseen)
            assert not any(is_unseen(language, word) for word in seen)
    assert any(thing.unseen_words["en"] for thing in things)


def test_lists_and_brackets_in_names_are_cut(archives: Archives, few_things: None, tmp_path: Path) -> None:
    """Where several begin alike, the next part tells them apart."""
    entries = names("hi", CODES[:3])
    for sign, name in zip(entries, ("लाल सेब, सेवफल", "लाल सेब (गोल)", "सेब’s  घर"), strict=True):
        entries[sign]["tts"] = [name]
    found = make_catalogue({**archives, NAMES: write_names(tmp_path / "names.tgz", {"hi": entries})})
    assert [thing.names["hi"] for thing in found[:3]] == ["सेवफल", "गोल", "सेब's घर"]


@pytest.mark.parametrize(
    ("having", "chosen"),
    [
        ({"en": "🐈🍕🚀", "de": "🍕🚀", "fr": "🚀"}, "🚀"),
        ({"en": "🐈🍕", "de": "🐈🍕"}, "🍕"),
        ({"en": "🐈🚀", "de": "🐈🚀"}, "🐈"),
    ],
)
def test_a_word_of_several_things_is_given_to_one(
    having: dict[str, str], chosen: str, archives: Archives, few_things: None, tmp_path: Path
) -> None:
    """To the one that has it in most languages; then that with fewest keywords; then that with the shortest name."""
    changed = {}
    for language, signs in having.items():
        changed[language] = names(language, CODES[:3])
        for sign in signs:
            changed[language][sign]["default"].append("Toy")
        for number in range(3):
            for sign in "🐈🚀":
                changed[language][sign]["default"].append(f"{sign}{number}")
    found = make_catalogue({**archives, NAMES: write_names(tmp_path / "names.tgz", changed)})
    assert [thing.sign for thing in found if "Toy" in thing.shared_words["en"]] == [chosen]


def test_things_of_one_name_and_things_without_are_refused(
    archives: Archives, few_things: None, tmp_path: Path
) -> None:
    same = {sign: {**entry, "tts": ["cat"]} for sign, entry in names("en", CODES[:3]).items()}
    for entries, message in ((same, "several things"), (names("en", CODES[:2]), "no name in")):
        write_names(tmp_path / "names.tgz", dict.fromkeys(LANGUAGES, entries))
        with pytest.raises(DataError, match=message):
            make_catalogue({**archives, NAMES: tmp_path / "names.tgz"})


def test_the_catalogue_is_read_as_it_was_written(things: tuple[Thing, ...], tmp_path: Path) -> None:
    write_catalogue(things, tmp_path / FILE)
    assert read_catalogue(tmp_path / FILE) == things
    (tmp_path / FILE).write_text('[{"code": "1f408"}]')
    with pytest.raises(DataError, match="no list of things"):
        read_catalogue(tmp_path / FILE)


def test_pictures_in_every_style_are_cut_out(archives: Archives) -> None:
    sprites = make_sprites(archives, CODES)
    assert set(sprites) == {(code, style) for code in CODES for style in STYLES}
    for image in sprites.values():
        assert image.mode == "RGBA" and image.getchannel("A").getbbox() == (0, 0, *image.size)
    assert sprites["1f408", "solid"].size == (41, 57)
    width, height = sprites["1f408", "flat"].size
    assert width / height == pytest.approx(12 / 8, abs=0.05)
    with pytest.raises(DataError, match="1f9ff"):
        make_sprites(archives, ["1f9ff"])


def test_a_thing_lies_where_and_on_what_its_words_say(archives: Archives) -> None:
    sprite = make_sprites(archives, ["1f355"])["1f355", "solid"]
    middles, widths = {}, {}
    for size, position in (("small", "left"), ("small", "centre"), ("small", "right"), ("large", "centre")):
        scene = ThingScene(code="1f355", background="blue", size=size, position=position)
        image = compose(sprite, scene, random.Random(3)).astype(int)
        assert image.shape == (128, 128, 3) and image[0, 0, 2] > image[0, 0, 0] + 60, "the ground is blue"
        columns = np.flatnonzero((image[..., 0] > image[..., 2]).any(axis=0))
        middles[size, position], widths[size, position] = columns.mean(), len(columns)
    assert middles["small", "left"] + 20 < middles["small", "centre"] < middles["small", "right"] - 20
    assert widths["large", "centre"] > 1.5 * widths["small", "centre"]


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(0)
    codes = [code for some in THINGS.values() for code in some]
    scenes = [random_scene(rng.choice(codes), rng) for _ in range(4000)]
    assert not any(scene.is_held_out for scene in scenes)
    grounds = [ThingScene(code=code, background=colour) for code in codes for colour in COLOURS]
    assert 0.07 < sum(scene.is_held_out for scene in grounds) / len(grounds) < 0.13
    styles = [ThingScene(code=code, background="red", style=style) for code in codes for style in STYLES[1:]]
    assert 0.15 < sum(scene.style_is_held_out for scene in styles) / len(styles) < 0.25
    counts = Counter(scene.style for scene in scenes)
    assert counts["solid"] > counts["flat"] > 300


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrases_say_all_that_has_words(language: str) -> None:
    """Every scene of a thing has words of its own, in lists and in sentences."""
    patterns = (None, *range(len(LANGUAGES[language].patterns)))
    for pattern in patterns:
        texts = {
            phrase(
                ThingScene(code="1f408", background=ground, size=size, position=position, style=style),
                "NAME",
                language,
                pattern=pattern,
            )
            for ground in COLOURS
            for size in ("small", "medium", "large")
            for position in POSITIONS
            for style in STYLES
        }
        assert len(texts) == 8 * 3 * 3 * 3
        assert all("NAME" in text and "{" not in text and "  " not in text for text in texts)
    plain = ThingScene(code="1f408", background="red")
    assert phrase(plain, "NAME", language, with_ground=False) == "NAME"


def test_phrases_in_english_and_german() -> None:
    scene = ThingScene(code="1f408", background="red", size="small", position="left", style="flat")
    assert phrase(scene, "cat", "en") == "cat, small, on the left, red background, flat style"
    assert phrase(scene, "cat", "en", pattern=0) == "cat on the left on a red background, small, flat style"
    assert phrase(scene, "Katze", "de", pattern=0) == "Katze links auf rotem Hintergrund, klein, flacher Stil"


def test_random_phrases_use_further_words_but_no_unseen_ones(things: tuple[Thing, ...]) -> None:
    scene, cat, rng = ThingScene(code="1f408", background="red"), things[0], random.Random(0)
    texts = " ".join(random_phrase(scene, cat, "en", rng, with_ground=False).casefold() for _ in range(300))
    assert all(word in texts for word in cat.words["en"])
    assert not any(word in texts.split() for word in cat.unseen_words["en"])


def test_shards_are_written_read_and_the_same_again(
    few_things: None, things: tuple[Thing, ...], tmp_path: Path
) -> None:
    report = write_things(tmp_path / "a", Amount(renders=3, shapes=0.25))
    assert report["images"] == 16 and report["shapes"] == 4 and report["things"] == 4
    assert json.loads((tmp_path / "a" / REPORT).read_text())["styles"].keys() == set(STYLES)
    write_things(tmp_path / "b", Amount(renders=3, shapes=0.25))
    with pytest.raises(DataError, match="another folder"):
        write_things(tmp_path / "b", Amount(renders=2, shapes=0.25))
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    examples = open_examples(str(tmp_path / "a"))
    first = examples[0].image
    assert len(examples) == 16 and first is not None and first.size == (128, 128)
    corpus = make_corpus(read_pictures(tmp_path / "a", tmp_path / "work"), things)
    assert len(corpus) == 16
    kinds = Counter(type(scene).__name__ for scene in corpus.shown)
    assert kinds == {"ThingScene": 12, "Scene": 4}
    assert not any(is_held_out(s) if isinstance(s, Scene) else s.is_held_out for s in corpus.shown)
    assert np.array_equal(corpus.pictures.pixels[0], np.asarray(first.convert("RGB")))
    batch = corpus.pictures.batch([0, 5])
    assert batch.shape == (2, 3, 128, 128) and -1 <= batch.min() < batch.max() <= 1
    rng = random.Random(0)
    for i in range(len(corpus)):
        assert corpus.plain_english(i, with_ground=True) != corpus.plain_english(i, with_ground=False)
        assert all(corpus.phrase(i, code, rng, with_ground=True) for code in LANGUAGES)


def stand_in_for_npm(folder: Path, source: Path, fails: bool = False) -> None:
    """A program called ``npm`` that hands out archives of a folder, as ``npm pack`` would."""
    folder.mkdir()
    program = folder / "npm"
    script = f'cp "{source}"/*.tgz "$5"\n' if not fails else 'echo "npm error 404 Not Found" >&2\nexit 1\n'
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)


def test_archives_are_fetched_once_and_must_be_the_right_ones(
    archives: Archives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_npm(tmp_path / "bin", next(iter(archives.values())).parent)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
    with pytest.raises(DataError, match=r"is not @lobehub/fluent-emoji-3d 1\.1\.0: expected SHA-512 Wlq2"):
        fetch(tmp_path / "packages")
    monkeypatch.setattr(packages, "_check", lambda package, path: None)
    assert {path.name for path in fetch(tmp_path / "packages").values()} == {path.name for path in archives.values()}
    shutil.rmtree(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    fetch(tmp_path / "packages")  # nothing is missing
    (tmp_path / "packages" / NOTO.archive).unlink()
    with pytest.raises(MissingDependencyError, match=r"npm pack @iconify-json/noto@1\.2\.9"):
        fetch(tmp_path / "packages")


def test_what_npm_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_npm(tmp_path / "bin", tmp_path, fails=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
    with pytest.raises(DataError, match=r"fluent-emoji-3d@1\.1\.0: npm error 404 Not Found\. Is the network there"):
        fetch(tmp_path / "packages")


def test_drawings_need_their_renderer(archives: Archives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match=r"flagai-altdiff\[things\]"):
        make_sprites(archives, CODES)
