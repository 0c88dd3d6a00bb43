"""LatentDiffusion: text encoder, UNet, autoencoder and noise schedule under LDM's names.

**Source**: Rombach et al. 2022 (arXiv 2112.10752). Samplers written against CompVis' ``LatentDiffusion`` (k-diffusion's
wrapper, for one) drive this class unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.added import AddedLora, AddedPart
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.models.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from flagai_altdiff.models.ema import LitEma
from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.models.text_encoder import PAD_ID, RobertaSeriesModelWithTransformation
from flagai_altdiff.models.unet import UNetModel
from flagai_altdiff.registry import UNREGISTERED
from flagai_altdiff.sampling.schedule import add_noise, make_betas, schedule_buffers, v_target

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from flagai_altdiff.tokenizer import Tokenizer

MAX_TOKENS = 77
"""Length of every text: longer prompts are cut, shorter ones padded."""


class ImageChecker(Protocol):
    """Judges finished images."""

    def check(self, images: Sequence[Image.Image], device: torch.device) -> list[bool]:
        """For each image, whether it must not be shown."""
        ...


class WeightKeeper(Protocol):
    """Has the weights where they work only while they do."""

    mode: str
    device: torch.device

    def send_home(self) -> None:
        """Put back all weights that do not work at the moment."""
        ...


class DiffusionWrapper(nn.Module):
    """The UNet under the name that checkpoints give it (``model.diffusion_model``)."""

    conditioning_key = "crossattn"

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x: Tensor, t: Tensor, c_crossattn: Sequence[Tensor], shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), list of (B, L_i, D) to be joined along L [, what is left out] -> (B, C, h, w)."""
        context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context, *shortcuts.arguments)


class LatentDiffusion(nn.Module):
    """A text-to-image model.

    Args:
        config: Sizes, schedule and parameterization.

    Attributes:
        text_tokenizer: Turns prompts into ids. It and the next four are set from outside, not in the state dict.
        spec: Defaults of its images.
        loras: What :func:`flagai_altdiff.lora.add_lora` has added to its weights.
        before_loras: What these weights were, where the LoRAs can be taken off again.
        parts: Words that were added, and an autoencoder that was put in.
        safety_checker: Judges its images, where it has one.
        autocast_dtype: Precision of the UNet and the decoder on a GPU; ``None`` is that of their weights.
        keeper: Brings weights to where they work and back, where memory is little.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.parameterization = config.parameterization
        self.scale_factor = config.scale_factor
        self.cond_stage_key = "caption"
        self.first_stage_key = "image"
        self.channels = config.unet.in_channels
        self.num_timesteps = config.timesteps
        self.model = DiffusionWrapper(UNetModel(config.unet))
        self.first_stage_model = AutoencoderKL(config.first_stage)
        self.cond_stage_model = RobertaSeriesModelWithTransformation(config.cond_stage)
        self.first_stage_model.requires_grad_(False)
        self.cond_stage_model.requires_grad_(config.cond_stage_trainable)
        for name, values in schedule_buffers(
            make_betas(config.beta_schedule, config.timesteps, config.linear_start, config.linear_end, config.cosine_s)
        ).items():
            self.register_buffer(name, values)
        self.model_ema: LitEma | None = LitEma(self.model) if config.use_ema else None
        self.text_tokenizer: Tokenizer | None = None
        self._scripts_tokenizer: PreTrainedTokenizerBase | None = None
        self._drawing_tokenizer: PreTrainedTokenizerBase | None = None
        self.spec = UNREGISTERED
        self.loras: tuple[AddedLora, ...] = ()
        self.before_loras: dict[str, Tensor] = {}
        self.parts: tuple[AddedPart, ...] = ()
        self.safety_checker: ImageChecker | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.keeper: WeightKeeper | None = None

    @property
    def device(self) -> torch.device:
        """Where it draws: where the weights are, or come to while they work."""
        return self.keeper.device if self.keeper else next(self.model.parameters()).device

    @property
    def memory(self) -> str:
        """How much memory it takes to draw: one of ``machine.MEMORY_MODES``."""
        return self.keeper.mode if self.keeper else "normal"

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's; but where memory is little, weights stay where they are and only work on the device."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.keeper is None or device is None:
            return super().to(*args, **kwargs)
        self.keeper.send_home()
        self.keeper.device = device
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))
        return self if dtype is None else super().to(dtype)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """As :meth:`to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        if self.keeper:
            self.keeper.send_home()  # what is done to weights is done to them at home
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet's weights."""
        return dtype_of(self.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A transformers tokenizer for scripts that call one, made when first asked for; drawing does without."""
        if self._scripts_tokenizer is None and self.text_tokenizer is not None:
            return self.text_tokenizer.to_transformers()
        return self._scripts_tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._scripts_tokenizer = tokenizer
        self._drawing_tokenizer = copy.deepcopy(tokenizer)  # the script may call its own meanwhile, which changes it

    # Conditioning

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, (B, 77) int64, cut and padded to 77, on the model's device.

        Args:
            texts: Prompts.
        """
        if self._drawing_tokenizer is not None:  # a script's own goes before the model's
            rows = self._drawing_tokenizer(list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS)[
                "input_ids"
            ]
        elif self.text_tokenizer is not None:
            rows = self.text_tokenizer.ids(texts, MAX_TOKENS)
        else:
            raise RuntimeError(
                "this model has no tokenizer; set model.text_tokenizer, or load the model from its folder"
            )
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def get_learned_conditioning(self, c: Sequence[str]) -> Tensor:
        """Text states for the UNet.

        Args:
            c: B prompts.

        Returns:
            (B, 77, context_dim). Padding rows are part of it: the UNet gets no mask.
        """
        return self.cond_stage_model(self.tokenize(c))

    # Denoising

    def apply_model(
        self,
        x_noisy: Tensor,
        t: Tensor,
        cond: Tensor | Sequence[Tensor] | dict[str, Any],
        shortcuts: Shortcuts = NONE,
    ) -> Tensor:
        """The UNet's output: eps, v or x0, as ``parameterization`` says.

        Args:
            x_noisy: (B, C, h, w).
            t: (B,) timesteps in [0, T).
            cond: (B, L, D), a list of such tensors, or ``{"c_crossattn": [...]}``.
            shortcuts: What is left out of the UNet's work; the output is another then.
        """
        if isinstance(cond, dict):
            cond = cond["c_crossattn"]
        cond = [cond] if isinstance(cond, Tensor) else cond
        return self.model(x_noisy.to(self.dtype), t, cond, *shortcuts.arguments)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of the latent at timestep t: sqrt(alpha_t) x_start + sqrt(1 - alpha_t) noise.

        Args:
            x_start: (B, C, h, w).
            t: (B,).
            noise: (B, C, h, w), standard normal; drawn when left out.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return add_noise(x_start, noise, self.alphas_cumprod[t][:, None, None, None])

    # Latents

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> posterior of the unscaled latent (B, C, H/f, W/f)."""
        return self.first_stage_model.encode(x.to(dtype_of(self.first_stage_model)))

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """A draw of the posterior (or the given latent), scaled for the UNet, (B, C, h, w)."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        return self.scale_factor * encoder_posterior

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """(B, C, h, w) as the UNet sees it -> (B, 3, h*f, w*f), about [-1, 1], not clamped."""
        return self.first_stage_model.decode((z / self.scale_factor).to(dtype_of(self.first_stage_model)))

    # Training

    def get_input(self, batch: Mapping[str, Any], k: str) -> tuple[Tensor, Any]:
        """Latents and conditioning of a batch.

        Args:
            batch: ``batch[k]`` (B, 3, H, W) in [-1, 1] and ``batch[cond_stage_key]``, B captions or (B, L, D) states.
                Where there are fewer captions than images, as in FlagAI's script with prior preservation, the B rows of
                ``batch["input_ids"]`` stand for them.
            k: Key of the images.

        Returns:
            (B, C, h, w) scaled latents, and the texts' states (B, L, D); the captions themselves where the text
            encoder is to learn, so that gradients reach it.
        """
        with torch.no_grad():
            z = self.get_first_stage_encoding(self.encode_first_stage(batch[k].to(self.device)))
            captions, ids = batch[self.cond_stage_key], batch.get("input_ids")
            if isinstance(captions, Tensor):
                return z, captions.to(self.device)
            if len(captions) != len(z) and ids is not None and len(ids) == len(z):
                padded = F.pad(ids[:, :MAX_TOKENS], (0, max(MAX_TOKENS - ids.shape[1], 0)), value=PAD_ID)
                return z, self.cond_stage_model(padded.to(self.device))
            learns = any(parameter.requires_grad for parameter in self.cond_stage_model.parameters())
            return z, captions if learns else self.get_learned_conditioning(captions)

    def forward(self, x: Tensor, c: Tensor | Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents at uniformly drawn timesteps.

        Args:
            x: (B, C, h, w), scaled latents.
            c: B captions, or their states (B, L, D).

        Returns:
            Scalar loss, and the values to log.
        """
        if len(c) != len(x):
            raise ValueError(f"{len(c)} texts for {len(x)} latents; a batch needs one for each")
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=x.device)
        return self.p_losses(x, c if isinstance(c, Tensor) else self.get_learned_conditioning(c), t)

    def p_losses(
        self, x_start: Tensor, cond: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction at given timesteps (Ho et al. 2020, eq. 14).

        Args:
            x_start: (B, C, h, w).
            cond: (B, L, D).
            t: (B,).
            noise: (B, C, h, w); drawn when left out.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        loss = F.mse_loss(output, self.prediction_target(x_start, t, noise))
        return loss, {"loss_simple": loss.detach()}

    def prediction_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the UNet should say of a noised image, as its parameterization has it (v: Salimans and Ho 2022).

        Args:
            x_start: (B, C, h, w).
            t: (B,).
            noise: (B, C, h, w).
        """
        alpha = self.alphas_cumprod[t][:, None, None, None]
        target = {"eps": lambda: noise, "x0": lambda: x_start, "v": lambda: v_target(x_start, noise, alpha)}
        return target[self.parameterization]()

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Run the block with the averaged weights in place of the trained ones; without an average, change nothing.

        Args:
            context: Ignored; LDM's callers pass a label.
        """
        return nullcontext() if self.model_ema is None else self.model_ema.in_place_of_parameters(self.model)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of its weights, as its first one says."""
    return next(module.parameters()).dtype
