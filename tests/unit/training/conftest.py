"""Teachers, students and data of tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, XLMRobertaConfig, XLMRobertaModel

from tests import tiny
from tests.data_files import noise_bytes

LETTERS = "abcdefghijklmnopqrstuvwxyz,."


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as transformers saves it; its tokenizer knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 24,
    }
    text |= {"vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=tiny.CHECKER_SIZES, projection_dim=24)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xlmr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xlmr")
    sizes = {name: tiny.ALTCLIP_TEXT[name] for name in tiny.ALTCLIP_TEXT if name != "project_dim"}
    torch.manual_seed(1)
    XLMRobertaModel(
        XLMRobertaConfig(**sizes, vocab_size=tiny.vocabulary_size(), type_vocab_size=1, pad_token_id=1)
    ).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images with captions in several languages, of which two are broken."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        content = noise_bytes((90 + number, 80))
        (folder / f"{number}.png").write_bytes(content[:200] if number in (3, 7) else content)
        captions = (tiny.SENTENCES[number % 11], tiny.SENTENCES[(number + 5) % 11])
        (folder / f"{number}.txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven lines of parallel text, one of them without English."""
    file = tmp_path_factory.mktemp("texts") / "pairs.jsonl"
    rows = [{"en": f"cat number {n}", "de": f"Katze {n}", "zh": tiny.SENTENCES[5]} for n in range(6)]
    lines = [*(json.dumps(row) for row in rows), json.dumps({"de": "nur deutsch"})]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file
