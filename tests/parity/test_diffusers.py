"""A model written as a diffusers folder gives in diffusers what it gives here.

The weights are random, every layer with outputs of order one, so that a weight in the wrong place cannot hide. The two
shapes are those of AltDiffusion-m9 (eight heads, convolutional projections, last hidden state) and -m18 (heads of equal
width, linear projections, hidden state before the last layer); the full-size case is -m18 itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated.alt_diffusion import AltDiffusionPipeline
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import RobertaSeriesModelWithTransformation
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flagai_altdiff.canvas import Canvas
from flagai_altdiff.checkpoint.diffusers_folder import read_config, weight_files, write_folder
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers, to_ldm
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.sampling import SAMPLERS, EpsFunction
from flagai_altdiff.sampling.guidance import Guidance
from flagai_altdiff.sampling.schedule import Schedule
from flagai_altdiff.sampling.windows import joined, make_windows
from flagai_altdiff.training.losses import denoising_losses
from flagai_altdiff.walks import walk_latents

TOLERANCE = 1e-4
GUIDANCE_SCALE = 7.5

TINY_UNET = UNetConfig(model_channels=32, norm_groups=8, context_dim=24)
TINY_TEXT = TextEncoderConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=100,
    max_position_embeddings=80,
    project_dim=24,
)
TINY_M9 = LatentDiffusionConfig(
    unet=TINY_UNET, first_stage=AutoencoderConfig(ch=16, ch_mult=(1, 2, 4), norm_groups=8), cond_stage=TINY_TEXT
)
M18 = LatentDiffusionConfig(
    unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
    cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
)
CONFIGS = {
    "m9": TINY_M9,
    "m18": replace(
        TINY_M9,
        unet=replace(TINY_UNET, num_heads=None, num_head_channels=16, use_linear_in_transformer=True),
        cond_stage=replace(TINY_TEXT, has_pre_transformation=True, has_pooler=False),
    ),
    "full m18": M18,
}


@dataclass(frozen=True)
class Pair:
    """Our model, the folder that was written from it, and what diffusers loads from there."""

    model: LatentDiffusion
    folder: Path
    unet: Any
    vae: Any
    cond: Tensor
    uncond: Tensor
    x_T: Tensor

    def scheduler(self, kind: Any, **changes: Any) -> Any:
        return kind.from_pretrained(self.folder, subfolder="scheduler", **changes)


@pytest.fixture(scope="module", params=["m9", "m18", pytest.param("full m18", marks=pytest.mark.full)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = write_and_load(CONFIGS[request.param], tmp_path_factory.mktemp("diffusers") / "model")
    with torch.no_grad():
        yield pair
    for file in pair.folder.rglob("*.safetensors"):
        file.unlink()  # the full-size model's are 6 GB


def write_and_load(config: LatentDiffusionConfig, folder: Path) -> Pair:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(config)
    model = randomised(model, config).eval()
    write_folder(folder, config, to_diffusers(model.state_dict(), config), [])
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    cond, uncond = torch.randn(2, 2, 77, config.unet.context_dim)
    return Pair(model, folder, unet, vae, cond, uncond, torch.randn(2, config.unet.in_channels, 8, 16))


def randomised(model: LatentDiffusion, config: LatentDiffusionConfig) -> LatentDiffusion:
    """A model with random weights in every layer that keep the outputs of order one; drops the meta tensors."""
    fresh = {name: tensor for name, tensor in LatentDiffusion(TINY_M9).named_buffers() if "." not in name}
    for name, weight in model.named_parameters():
        fan_in = math.prod(weight.shape[1:])
        if weight.ndim > 1:
            fresh[name] = torch.randn(weight.shape) / math.sqrt(fan_in)
        else:
            fresh[name] = 0.2 * torch.randn(weight.shape) + (1.0 if _is_norm(model, name) else 0.0)
    fresh["cond_stage_model.roberta.embeddings.position_ids"] = torch.arange(config.cond_stage.max_position_embeddings)[
        None
    ]
    model.load_state_dict(fresh, assign=True)
    return model


def _is_norm(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(module), (nn.GroupNorm, nn.LayerNorm))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    scale = theirs.abs().max()
    assert 0.1 < scale < 1e4, "the comparison says nothing at this size"
    error = ((ours - theirs).abs().max() / scale).item()
    assert error < TOLERANCE


def token_ids(vocab_size: int) -> Tensor:
    """Texts of 77, 20 and 2 tokens, padded to 77."""
    ids = torch.randint(4, vocab_size, (3, 77))
    ids[:, 0] = 0
    for row, length in enumerate((77, 20, 2)):
        ids[row, length - 1] = 2
        ids[row, length:] = 1
    return ids


def test_the_weights_read_back_unchanged(pair: Pair) -> None:
    parts = {part: load_file(weight_files(pair.folder, part)[0]) for part in ("unet", "vae", "text_encoder")}
    assert read_config(pair.folder) == pair.model.config
    state = pair.model.state_dict()
    back = to_ldm(parts, pair.model.config)
    assert back.keys() == {key for key in state if key not in dict(pair.model.named_buffers(recurse=False))}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_text_states_of_the_deprecated_class(pair: Pair) -> None:
    text_encoder = RobertaSeriesModelWithTransformation.from_pretrained(pair.folder, subfolder="text_encoder").eval()
    ids = token_ids(pair.model.config.cond_stage.vocab_size)
    theirs = text_encoder(ids, attention_mask=(ids != 1).long(), return_dict=True).projection_state
    assert_close(pair.model.cond_stage_model(ids), theirs)


def test_text_states_of_transformers(pair: Pair) -> None:
    config = pair.model.config.cond_stage
    roberta = transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig.from_pretrained(pair.folder, subfolder="text_encoder"), add_pooling_layer=False
    ).eval()
    weights = load_file(weight_files(pair.folder, "text_encoder")[0])
    names = {key: "roberta." + key for key in roberta.state_dict()}
    roberta.load_state_dict({key: weights[name] for key, name in names.items()})
    ids = token_ids(config.vocab_size)
    states = roberta(ids, attention_mask=(ids != 1).long(), output_hidden_states=True, return_dict=True).hidden_states
    if config.has_pre_transformation:
        norm = nn.functional.layer_norm(
            states[-2],
            (config.hidden_size,),
            weights["pre_LN.weight"],
            weights["pre_LN.bias"],
            eps=config.layer_norm_eps,
        )
        theirs = nn.functional.linear(norm, weights["transformation_pre.weight"], weights["transformation_pre.bias"])
    else:
        theirs = nn.functional.linear(states[-1], weights["transformation.weight"], weights["transformation.bias"])
    assert_close(pair.model.cond_stage_model(ids), theirs)


def test_unet(pair: Pair) -> None:
    t = torch.tensor([1, 751])
    assert_close(pair.model.apply_model(pair.x_T, t, pair.cond), pair.unet(pair.x_T, t, pair.cond).sample)


def test_autoencoder(pair: Pair) -> None:
    image = torch.rand(1, 3, 64, 32) * 2 - 1
    posterior, theirs = pair.model.encode_first_stage(image), pair.vae.encode(image).latent_dist
    assert_close(posterior.mean, theirs.mean)
    assert_close(posterior.logvar, theirs.logvar)
    assert_close(
        pair.model.decode_first_stage(pair.x_T), pair.vae.decode(pair.x_T / pair.vae.config.scaling_factor).sample
    )


@torch.no_grad()
def test_autoencoder_that_attends_at_some_levels(tmp_path: Path) -> None:
    attends = AutoencoderConfig(ch=8, ch_mult=(1, 2), resolution=32, attn_resolutions=(16,), norm_groups=4)
    pair = write_and_load(replace(TINY_M9, first_stage=attends), tmp_path / "model")
    assert "AttnDownEncoderBlock2D" in pair.vae.config.down_block_types
    test_autoencoder(pair)


def our_latent(pair: Pair, sampler: str, steps: int, parameterization: str) -> Tensor:
    guidance = Guidance(pair.cond, pair.uncond, GUIDANCE_SCALE, pair.model.alphas_cumprod, parameterization)
    eps = partial(guidance.eps, EagerEngine(pair.model).denoise)
    schedule = Schedule.make(pair.model.alphas_cumprod, steps)
    walk = SAMPLERS[sampler].walk(eps, pair.x_T, schedule, noise=lambda: torch.zeros_like(pair.x_T))
    return [step.x for step in walk][-1]


def their_latent(pair: Pair, scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = pair.x_T
    for t in scheduler.timesteps:
        without = pair.unet(x, t, pair.uncond).sample
        output = without + GUIDANCE_SCALE * (pair.unet(x, t, pair.cond).sample - without)
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_ddim(pair: Pair, ours: str, theirs: str) -> None:
    scheduler = pair.scheduler(diffusers.DDIMScheduler, prediction_type=theirs)
    assert not scheduler.config.clip_sample
    assert_close(our_latent(pair, "ddim", 4, ours), their_latent(pair, scheduler, 4))


@pytest.mark.parametrize("steps", [2, 5])
def test_plms_is_pndm_without_runge_kutta(pair: Pair, steps: int) -> None:
    """The two coincide for models that predict eps, from two steps on, where the step count divides the schedule's
    length.

    With one step, PLMS still averages two predictions and PNDM takes one. With 6 of 1000, the grid here has 7
    timesteps. For v, PNDM mixes the v of several timesteps before it turns them into noise, and PLMS mixes the noise.
    """
    scheduler = pair.scheduler(diffusers.PNDMScheduler)
    assert_close(our_latent(pair, "plms", steps, "eps"), their_latent(pair, scheduler, steps))


def test_the_deprecated_pipeline(pair: Pair) -> None:
    """Put together from the folder by hand, because its text encoder's entry no longer resolves in
    ``from_pretrained``."""
    pipeline: Any = AltDiffusionPipeline(
        vae=pair.vae,
        text_encoder=RobertaSeriesModelWithTransformation.from_pretrained(pair.folder, subfolder="text_encoder"),
        tokenizer=None,
        unet=pair.unet,
        scheduler=pair.scheduler(diffusers.PNDMScheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    f = pair.model.config.first_stage.downsampling
    theirs = pipeline(
        prompt_embeds=pair.cond,
        negative_prompt_embeds=pair.uncond,
        latents=pair.x_T,
        height=8 * f,
        width=16 * f,
        num_inference_steps=4,
        guidance_scale=GUIDANCE_SCALE,
        output_type="pt",
    ).images
    ours = pair.model.decode_first_stage(our_latent(pair, "plms", 4, "eps"))
    assert_close((ours / 2 + 0.5).clamp(0, 1), theirs)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_losses_of_training(kind: str, theirs: str, gamma: float, pair: Pair) -> None:
    scheduler = pair.scheduler(diffusers.DDPMScheduler, prediction_type=theirs)
    latents, noise, t = pair.x_T * 0.7, torch.randn_like(pair.x_T), torch.tensor([20, 870])
    output = pair.unet(scheduler.add_noise(latents, noise, t), t, pair.cond).sample
    target = {"eps": noise, "v": scheduler.get_velocity(latents, noise, t), "x0": latents}[kind]
    expected = ((output - target) ** 2).mean(dim=(1, 2, 3))
    if gamma:
        snr = compute_snr(scheduler, t)
        expected *= snr.clamp(max=gamma) / {"eps": snr, "v": snr + 1, "x0": torch.ones(2)}[kind]
    before = pair.model.parameterization
    pair.model.parameterization = kind  # type: ignore[assignment]
    try:
        assert_close(denoising_losses(pair.model, latents, pair.cond, t, noise, min_snr_gamma=gamma), expected)
    finally:
        pair.model.parameterization = before


def pipeline_of(pair: Pair, kind: Any, **parts: Any) -> Any:
    """A pipeline of Stable Diffusion's with our weights; texts come as states."""
    made = kind(
        vae=pair.vae,
        text_encoder=None,
        tokenizer=None,
        unet=pair.unet,
        scheduler=pair.scheduler(diffusers.DDIMScheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


def walked(pair: Pair, request: GenerationRequest, canvas: Canvas | None, x: Tensor) -> Tensor:
    """What our drawing ends with, from the same states."""
    engine = EagerEngine(pair.model)
    resolved = request.resolve(
        height=64, width=64, steps=4, guidance_scale=GUIDANCE_SCALE, downsampling=engine.cell, halvings=1
    )

    def predict(shape: Sequence[int]) -> EpsFunction:
        guidance = Guidance(pair.cond[:1], pair.uncond[:1], GUIDANCE_SCALE, engine.alphas_cumprod)
        whole = partial(guidance.eps, engine.denoise)
        if not resolved.window:
            return whole
        cells, overlap = ((side or 0) // engine.cell for side in (resolved.window, resolved.window_overlap))
        return joined(lambda window: whole, make_windows(shape[2:], cells, cells - overlap))

    *_, last = walk_latents(engine, resolved, canvas, x, lambda shape: torch.zeros(1, *shape), predict)
    return last.x


GIVEN = Image.new("RGB", (64, 64), "red")


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (5, 0.6), (10, 0.35)])
def test_img2img(pair: Pair, steps: int, strength: float) -> None:
    clean = pair.x_T[:1] * 0.6
    theirs = pipeline_of(pair, diffusers.StableDiffusionImg2ImgPipeline)(
        prompt_embeds=pair.cond[:1],
        negative_prompt_embeds=pair.uncond[:1],
        image=clean,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    request = GenerationRequest(prompts=("a",), init_image=GIVEN, strength=strength, steps=steps)
    assert_close(walked(pair, request, Canvas(clean=clean), noise), theirs)


@pytest.mark.parametrize("strength", [0.8, 0.6])
def test_inpainting(pair: Pair, strength: float) -> None:
    clean = pair.x_T[:1] * 0.6
    f = pair.model.config.first_stage.downsampling
    cells = torch.zeros(1, 1, *clean.shape[2:])
    cells[..., 2:7, 4:11] = 1
    theirs = pipeline_of(pair, diffusers.StableDiffusionInpaintPipeline)(
        prompt_embeds=pair.cond[:1],
        negative_prompt_embeds=pair.uncond[:1],
        image=clean,
        masked_image_latents=clean,
        mask_image=cells.repeat_interleave(f, 2).repeat_interleave(f, 3),
        height=clean.shape[2] * f,
        width=clean.shape[3] * f,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    request = GenerationRequest(prompts=("a",), init_image=GIVEN, strength=strength, steps=5)
    ours = walked(pair, request, Canvas(clean=clean, mask=cells), noise)
    assert_close(ours * cells, theirs * cells)


def test_panorama(pair: Pair) -> None:
    """Windows of 64 cells, 8 apart, as theirs has them."""
    f = pair.model.config.first_stage.downsampling
    noise = torch.randn(1, pair.model.channels, 64, 80, generator=torch.Generator().manual_seed(3))
    theirs = pipeline_of(pair, diffusers.StableDiffusionPanoramaPipeline)(
        prompt_embeds=pair.cond[:1],
        negative_prompt_embeds=pair.uncond[:1],
        latents=noise,
        height=64 * 8,  # it counts windows by cells of 8 px, whatever the autoencoder's are
        width=80 * 8,
        num_inference_steps=2,
        guidance_scale=GUIDANCE_SCALE,
        circular_padding=False,
        output_type="latent",
    ).images
    request = GenerationRequest(
        prompts=("a",), steps=2, height=64 * f, width=80 * f, window=64 * f, window_overlap=56 * f
    )
    assert_close(walked(pair, request, None, noise), theirs)
