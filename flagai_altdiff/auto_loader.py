"""AutoLoader: FlagAI's loader. A task and a model name -> files -> model, tokenizer, transform."""

from __future__ import annotations

import difflib
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flagai_altdiff import checkpoint, hub
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.clip_images import ClipImageTransform, MatchingTransform
from flagai_altdiff.errors import CheckpointError, last_net
from flagai_altdiff.loading import load_model
from flagai_altdiff.lora import add_lora, lora_files
from flagai_altdiff.matching import find_transform, load_matching_model, load_weights
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.registry import MATCHING, as_task, locate
from flagai_altdiff.tokenizer import Tokenizer, load_tokenizer, own_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class AutoLoader:
    """Loads a model by name, fetching its files into ``model_dir`` if they are not there.

    Args:
        task_name: ``"text2img"`` (also as ``"img2img"``, ``"inpainting"``) or ``"txt_img_matching"``.
        model_name: A registered name in any case, or the path of a folder or file with weights.
        model_dir: Folder of the model folders.
        only_download_config: Fetch and read config and tokenizer only; ``get_model()`` then raises.
        device: Where the script will move the model; the loader itself leaves it on the CPU, as FlagAI's does.
        torch_dtype: Accepted for FlagAI's sake; ``fp16`` decides.
        lora_dir: A LoRA, or a folder of them, to add to a model that draws, at full strength; see ``add_lora``.
        fp16: Draw in half precision when the model is on a GPU; ``use_fp16`` is the same.
        safety_checker: ``"auto"``, ``True`` or ``False``; see ``load_model``.
        memory: ``"auto"``, ``"normal"``, ``"low"`` or ``"lowest"``, of a model that draws; see ``load_model``. Moving
            a model of little memory to a GPU says where it works; with ``fp16`` it does so in half precision.
        kwargs: ``use_fp16``; anything else is named in one warning and has no effect.

    Raises:
        UnknownTaskError: No such task.
        UnknownModelError: No such model, with the nearest name.
        HubError: Files are missing and could not be fetched.
        CheckpointError: The files are not such a model.
    """

    def __init__(
        self,
        task_name: str = "text2img",
        model_name: str = "AltDiffusion-m18",
        model_dir: str | Path = "./checkpoints/",
        only_download_config: bool = False,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype = torch.float16,
        low_cpu_mem_usage: bool = True,
        lora_dir: str | Path | None = None,
        qlora_dir: str | None = None,
        inference_mode: bool = True,
        model_max_length: int | None = None,
        all_devices: bool = False,
        *,
        fp16: bool | None = None,
        safety_checker: bool | str = "auto",
        memory: str = "auto",
        **kwargs: object,
    ) -> None:
        task_name = as_task(task_name)
        for name in kwargs:  # FlagAI takes anything; a slip of the pen must not fetch another model
            if near := difflib.get_close_matches(name, inspect.signature(AutoLoader).parameters, n=1, cutoff=0.85):
                raise TypeError(f"AutoLoader has no argument {name!r}; did you mean {near[0]!r}?")
        half = bool(kwargs.pop("use_fp16", False)) if fp16 is None else fp16
        meaningless = {
            "torch_dtype": torch_dtype != torch.float16,
            "low_cpu_mem_usage": not low_cpu_mem_usage,
            "lora_dir": lora_dir is not None and task_name == MATCHING,
            "qlora_dir": qlora_dir is not None,
            "inference_mode": not inference_mode,
            "model_max_length": model_max_length is not None,
            "all_devices": all_devices,
            "memory": memory != "auto" and task_name == MATCHING,
        }
        ignored = [name for name, changed in meaningless.items() if changed] + list(kwargs)
        if ignored:
            logger.warning("AutoLoader: %s has no effect here", ", ".join(sorted(ignored)))
        self.task_name = task_name
        self.model_name = str(model_name)
        self.model_dir = Path(model_dir)
        self.device = device
        self.transform: ClipImageTransform | MatchingTransform = ClipImageTransform()
        self.model: LatentDiffusion | AltCLIP | None = None
        self._config_tokenizer: Tokenizer | None = None
        if only_download_config:
            folder, self._config_tokenizer = self._config_only()
            self.transform = find_transform(folder) if task_name == MATCHING else self.transform
        elif task_name == MATCHING:
            self.model = load_matching_model(model_name, self.model_dir)
            self.transform = self.model.transform
        else:
            loras = lora_files(lora_dir) if lora_dir else []
            self.model = load_model(model_name, self.model_dir, safety_checker=safety_checker, memory=memory)
            self.model.autocast_dtype = torch.float16 if half else None
            for lora in loras:
                add_lora(self.model, lora)
        self.process = self.transform

    def get_model(self) -> Any:
        """The model, in evaluation mode on the CPU: a ``LatentDiffusion`` or an ``AltCLIP``, as the task says."""
        if self.model is None:
            raise CheckpointError(
                f"only_download_config=True: {self.model_name} was not loaded. Call AutoLoader again without it."
            )
        return self.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer as transformers has it, made when it is first asked for."""
        if self._config_tokenizer is not None:
            return self._config_tokenizer.to_transformers()
        tokenizer: PreTrainedTokenizerBase | None = self.get_model().tokenizer
        return tokenizer

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self.tokenizer

    def get_transform(self) -> Callable[[Image], Any]:
        """CLIP's preparation of an image: as a tensor; for matching, as a mapping with ``pixel_values``."""
        return self.transform

    def get_task_name(self, brief_name: str) -> str:
        """The full name of a task; they are the same here."""
        return brief_name

    def load_pretrain_params(self, model_path: str | Path) -> None:
        """Give the model the weights of another file of the same shape.

        Args:
            model_path: ``.ckpt``, ``.bin`` or ``.safetensors`` with the names of the released files.

        Raises:
            CheckpointError: The file cannot be read, or has other weights; the model stays as it was.
        """
        model = self.get_model()
        if isinstance(model, AltCLIP):
            load_weights(model, model_path)
            return
        with last_net(model_path):
            checkpoint.assign(model, read_tensors(Path(model_path)), str(model_path))
        model.loras, model.before_loras = (), {}

    def _config_only(self) -> tuple[Path, Tokenizer]:
        path = locate(self.model_name, self.model_dir, task=self.task_name)[1]
        return path, find_own_tokenizer(self.model_name, self.model_dir, task=self.task_name)


def find_own_tokenizer(name: str, model_dir: str | Path, *, task: str | None = None) -> Tokenizer:
    """The tokenizer of a model, whose weights need not be there; it is fetched if it is not.

    Args:
        name: Registered, or a path.
        model_dir: Folder of the model folders.
        task: What a registered model must be for; any if left out.

    Raises:
        UnknownModelError: Neither registered nor a path.
        CheckpointError: There is no tokenizer.
        HubError: It could not be fetched.
    """
    spec, path = locate(name, model_dir, task=task)
    found = own_tokenizer(path)
    if found is None and spec and spec.sources:
        found = own_tokenizer(hub.fetch(spec, path, config_only=True))
    if found is None:
        raise CheckpointError(f"{path} has no tokenizer (sentencepiece.bpe.model or tokenizer.json).")
    return load_tokenizer(found)
