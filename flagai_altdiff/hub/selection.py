"""Which files of a repository in the diffusers layout make a model."""

from __future__ import annotations

from flagai_altdiff.hub.remote import RemoteFile

INDEX = "model_index.json"
PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")


def select(files: list[RemoteFile]) -> list[RemoteFile]:
    """Drop other formats, variants such as ``.fp16.``, and pickles of a part that has safetensors."""
    kept = [file for file in files if file.name == INDEX or _belongs(file.name)]
    safe = {file.name.split("/")[0] for file in kept if file.name.endswith(".safetensors")}
    return [file for file in kept if not (file.name.endswith(".bin") and file.name.split("/")[0] in safe)]


def _belongs(path: str) -> bool:
    part, _, file = path.partition("/")
    if part not in PARTS or "/" in file or ".fp16." in file or not file.endswith(SUFFIXES):
        return False
    return not file.endswith((".bin", ".safetensors")) or file.count(".") == 1
