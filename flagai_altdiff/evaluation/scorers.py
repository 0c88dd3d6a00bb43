"""What looks at images and says numbers: networks whose features are compared, and judges of single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff import checkpoint
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.errors import CheckpointError, InvalidRequestError, StateDictMismatchError, last_net
from flagai_altdiff.evaluation.inception import Inception
from flagai_altdiff.evaluation.settings import FETCH_INCEPTION
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.matching import image_features, load_matching_model, text_features
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.registry import DEFAULT_MODEL_DIR


class Scorer(Protocol):
    """Looks at images.

    A column of one number for each image becomes a mean in the table, with an interval; ``features`` (B, D) are
    compared with the reference's, ``logits`` (B, classes) give an Inception score. NaN: nothing can be said.
    """

    @property
    def key(self) -> str:
        """What it is and which weights it has; other keys, other numbers."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Columns for images, and the prompts that they were drawn from; images without any have none."""
        ...


class InceptionScorer:
    """Features and logits of the Inception network.

    Args:
        network: With its weights, in evaluation mode.
    """

    def __init__(self, network: Inception) -> None:
        self._network = network
        self.key = f"inception {fingerprint(network)}"

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """``features`` and ``logits`` of images of one size."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        features, logits = self._network(pixels.to(self._network.fc.weight.device))
        return {"features": features.cpu(), "logits": logits.cpu()}


class AltCLIPFeatures:
    """Features of a matching model's image tower, in the place of Inception's.

    Args:
        model: The matching model.
        normalised: Whether to length one, as they are compared with texts.
    """

    def __init__(self, model: AltCLIP, *, normalised: bool = False) -> None:
        self._model, self._normalised = model, normalised
        self.key = f"{model.name} {fingerprint(model)}{' normalised' if normalised else ''}"

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """``features``."""
        if self._normalised:
            return {"features": image_features(self._model, images)}
        pixels = torch.stack([self._model.transform.transform(image) for image in images])
        return {"features": self._model.get_image_features(pixels.to(self._model.device)).cpu()}


class ClipSimilarity:
    """How well an image fits the English caption of its prompt.

    Args:
        model: The matching model.
    """

    def __init__(self, model: AltCLIP) -> None:
        self._model = model
        self.key = f"similarity by {model.name} {fingerprint(model)}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """``clip_similarity``: cosines; NaN where the English is not known."""
        texts = [prompt.english for prompt in prompts]
        known = torch.tensor([text is not None for text in texts])
        cosines = (image_features(self._model, images) * text_features(self._model, [t or "" for t in texts])).sum(
            dim=1
        )
        return {"clip_similarity": cosines.where(known, torch.nan)}


def load_features(
    weights: str | Path, model_dir: str | Path = DEFAULT_MODEL_DIR, *, device: str | torch.device = "cpu"
) -> Scorer:
    """The network whose features are compared.

    Args:
        weights: The file of Inception's weights, or the name or folder of a matching model.
        model_dir: Folder of the model folders.
        device: Where it computes.

    Raises:
        InvalidRequestError: There is no such file.
        CheckpointError: It holds something else.
    """
    path = Path(weights)
    if not path.is_file():
        if path.suffix in (".pth", ".pt", ".safetensors"):
            raise InvalidRequestError("features", str(weights), f"there is no such file; get it: {FETCH_INCEPTION}")
        return AltCLIPFeatures(load_matching_model(weights, model_dir, device=device, mapped=True))
    with last_net(path):
        network = _read_inception(path)
    return InceptionScorer(network.eval().to(device))


def _read_inception(path: Path) -> Inception:
    state = read_tensors(path)
    with torch.device("meta"):
        network = Inception()
    # How many batches the norms have seen is of no account, and not in every file.
    buffers = {
        name: state.get(name, torch.tensor(0)) for name, _ in network.named_buffers() if name.endswith("tracked")
    }
    averages = {name for name, _ in network.named_buffers()} - buffers.keys()
    try:
        checkpoint.assign(network, state, str(path))
        if lacking := sorted(averages - state.keys()):
            raise StateDictMismatchError(str(path), lacking)
    except StateDictMismatchError as error:
        text = f"{path} holds no weights of FID's Inception network. Get them: {FETCH_INCEPTION}\n({error})"
        raise CheckpointError(text) from None
    buffers |= {name: state[name].float().clone() for name in averages}
    network.load_state_dict(buffers, strict=False, assign=True)
    return network
