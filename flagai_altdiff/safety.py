"""The image safety checker of the released models.

A CLIP image tower compares each image with fixed concept vectors; one over its threshold flags the image.

**Source**: Radford et al. 2021 (arXiv 2103.00020) for CLIP; Rando et al. 2022 (arXiv 2210.04610) describe the checker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flagai_altdiff.checkpoint import assign
from flagai_altdiff.checkpoint.json_config import ConfigFile, load_json
from flagai_altdiff.checkpoint.mapped import let_go
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.clip_images import ClipImageTransform
from flagai_altdiff.errors import CheckpointError, printable
from flagai_altdiff.model_files import CHECKER_WEIGHTS

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

_CONCEPTS, _SPECIAL = 17, 3
_MAX_LAYERS = 100
_MARGIN = 0.01
"""How much stricter the concepts are judged when a special-care concept is close."""


class CheckerNetwork(nn.Module):
    """Image tower, projection and concept vectors, under the names of the released file.

    Args:
        config: Sizes of the image tower.
        projection_dim: Width of the concept vectors.
    """

    def __init__(self, config: CLIPVisionConfig, projection_dim: int) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(_CONCEPTS, projection_dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(_SPECIAL, projection_dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(_CONCEPTS), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(_SPECIAL), requires_grad=False)

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B,) bool: whether each image is flagged."""
        pooled = self.vision_model(pixel_values).pooler_output
        embeds = F.normalize(self.visual_projection(pooled))
        special = embeds @ F.normalize(self.special_care_embeds).T - self.special_care_embeds_weights
        concepts = embeds @ F.normalize(self.concept_embeds).T - self.concept_embeds_weights
        margin = _MARGIN * (special.round(decimals=3) > 0).any(dim=1, keepdim=True)
        return ((concepts + margin).round(decimals=3) > 0).any(dim=1)


class SafetyChecker:
    """Judges finished images.

    Args:
        network: The image tower with its concepts; moved to the device of each check.
        image_size: Side of the images that it looks at, in pixels.
        spares: Whether it stays on the CPU, whatever device a check names, and lets its mapped weights go after each.
    """

    def __init__(self, network: CheckerNetwork, image_size: int, *, spares: bool = False) -> None:
        self.network = network
        self.spares = spares
        self.transform = ClipImageTransform(size=image_size)

    def check(self, images: Sequence[Image.Image], device: torch.device) -> list[bool]:
        """Judge images on ``device``.

        Args:
            images: PIL images.
            device: Where to compute.

        Returns:
            For each image, whether it is flagged.
        """
        device = torch.device("cpu") if self.spares else device
        pixel_values = torch.stack([self.transform(image) for image in images]).to(device)
        flags = [bool(flag) for flag in self.network.to(device)(pixel_values)]
        for weight in self.network.parameters() if self.spares else ():
            let_go(weight)
        return flags


def load_safety_checker(folder: Path, *, mapped: bool = False, spares: bool = False) -> SafetyChecker:
    """Load FlagAI's ``SafetyChecker`` or a diffusers ``safety_checker`` folder.

    Args:
        folder: ``config.json`` and the weights.
        mapped: Leave the weights of a large file mapped.
        spares: See :class:`SafetyChecker`.

    Raises:
        CheckpointError: Files are missing or of another kind.
    """
    files = (path for name in CHECKER_WEIGHTS if (path := folder / name).is_file() and path.stat().st_size)
    weights = next(files, None)
    if weights is None:
        raise CheckpointError(
            f"{folder} has no model.safetensors and no pytorch_model.bin. Download the safety checker again."
        )
    try:
        network = _build(load_json(folder / "config.json"))
    except Exception as error:  # transformers refuses sizes with errors of its own
        raise CheckpointError(
            f"{folder / 'config.json'} is not a safety checker's config: {printable(' '.join(str(error).split()), 400)}"
        ) from error
    state = {}
    for key, value in read_tensors(weights).items():
        if not key.endswith("position_ids"):  # a constant that old files carry
            state[key.replace("vision_model.vision_model.", "vision_model.")] = value
    assign(network, state, str(weights), mapped=mapped)
    for module in network.modules():  # the one buffer that no file has
        if isinstance(ids := getattr(module, "position_ids", None), Tensor):
            module.register_buffer("position_ids", torch.arange(ids.shape[-1]).expand(ids.shape), persistent=False)
    return SafetyChecker(network.eval(), network.vision_model.config.image_size, spares=spares)


def _build(file: ConfigFile) -> CheckerNetwork:
    """The network without storage: sizes of a config are believed only when the weights have them too."""
    from transformers import CLIPVisionConfig

    sizes = file.fields.get("vision_config")
    if not isinstance(sizes, dict):
        raise file.error("vision_config", "a mapping")
    vision = ConfigFile(file.path, sizes)
    depth = vision.integer("num_hidden_layers", 12)
    if depth > _MAX_LAYERS:
        raise vision.error("num_hidden_layers", f"at most {_MAX_LAYERS}")
    # Older files leave out what equals the defaults of their time: ViT-L/14 wrote all, the rest is ViT-B/32.
    config = CLIPVisionConfig(
        hidden_size=vision.integer("hidden_size", 768),
        intermediate_size=vision.integer("intermediate_size", 3072),
        num_hidden_layers=depth,
        num_attention_heads=vision.integer("num_attention_heads", 12),
        image_size=vision.integer("image_size", 224),
        patch_size=vision.integer("patch_size", 32),
        hidden_act=vision.choice("hidden_act", {"quick_gelu": "quick_gelu", "gelu": "gelu"}, "quick_gelu"),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-5),
    )
    with torch.device("meta"):
        return CheckerNetwork(config, file.integer("projection_dim", 512))
