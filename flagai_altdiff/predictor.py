"""Predictor: FlagAI's call with FlagAI's argument names -> a request -> files. The legacy names end here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.options import options_of, other_names
from flagai_altdiff.output import draw_to_folder
from flagai_altdiff.pipeline import GenerationResult, unwrapped
from flagai_altdiff.prompt_files import has_requests, read_prompt_file
from flagai_altdiff.request import OPTIONS, GenerationRequest, Output
from flagai_altdiff.sampling import Step

_FLAGAI = {name: option.flagai for name, option in OPTIONS.items()}
_NATIVE = {flagai: name for name, flagai in _FLAGAI.items() if name != "batch_size"}
"""FlagAI's name of an option -> ours."""


_FURTHER = tuple(name for name in options_of(GenerationRequest) if OPTIONS[name].quiet)
"""Options that FlagAI never had."""


class Predictor:
    """Draws images with a loaded model and files them as FlagAI does.

    Args:
        model: From ``AutoLoader.get_model()`` or ``load_model``; also inside ``torch.compile``.
        tokenizer: FlagAI's second argument; the model brings its own, so it is not needed.
    """

    def __init__(self, model: LatentDiffusion, tokenizer: object = None) -> None:
        self.model = unwrapped(model)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> object:
        """The tokenizer that was given, else the model's, as transformers has it."""
        return self.model.tokenizer if self._tokenizer is None else self._tokenizer

    def predict_generate_images(
        self,
        prompt: str | Sequence[str] | None = None,
        outpath: str | Path = "AltDiffusionOutputs",
        n_samples: int = 4,
        n_rows: int = 0,
        skip_grid: bool = False,
        skip_save: bool = False,
        ddim_steps: int | None = None,
        n_iter: int = 1,
        plms: bool = False,
        fixed_code: bool = False,
        ddim_eta: float = 0.0,
        H: int | None = None,
        W: int | None = None,
        C: int | None = None,
        f: int | None = None,
        scale: float | None = None,
        from_file: str | Path | None = None,
        seed: int | None = 34234,
        negative_prompt: str | None = "",
        *,
        sampler: str | None = None,
        grid: str | None = None,
        seed_mode: str = "batch",
        callback: Callable[[Step], object] | None = None,
        resume: bool = False,
        comments: bool = False,
        out_path: str | Path | None = None,
        ddim_step: int | None = None,
        **further: Any,
    ) -> GenerationResult:
        """Draw images and save them as ``samples/00000.png …`` and ``grid-0000.png …``.

        What is left out, the model decides: 512 x 512 pixels, 50 steps and scale 7.5 for the released models. The
        random numbers are those that FlagAI draws after seeding the process, from a generator of the call's own: the
        program's are left alone.

        Args:
            prompt: A prompt, or several: n_samples images of each.
            outpath: Folder for the images; ``out_path`` is the same.
            n_samples: Images of each prompt, drawn together.
            n_rows: Images per row of the grid; 0 means n_samples.
            skip_grid: Make no grid.
            skip_save: Save no single images.
            ddim_steps: Sampler steps, 1 to 1000; ``ddim_step`` is the same.
            n_iter: How often to draw everything.
            plms: Use the PLMS sampler.
            fixed_code: Start every batch from the same noise.
            ddim_eta: Share of fresh noise in DDIM, 0 to 1.
            H: Height in pixels.
            W: Width in pixels.
            C: Latent channels; only the model's own number is valid.
            f: Pixels per latent cell; only the model's own number is valid.
            scale: Guidance scale; 1 turns guidance off.
            from_file: Text file with a prompt per line, drawn once each, n_samples at a time; replaces ``prompt``.
            seed: 0 to 2**32 - 1; -1 or None draws one.
            negative_prompt: What the images must not show.
            sampler: One of ``flagai_altdiff.SAMPLERS``, or what A1111 calls it.
            grid: Where the steps lie: ``"flagai"`` (unless the sampler's name says otherwise), ``"trailing"``,
                ``"uniform"``, ``"karras"`` or ``"exponential"``.
            seed_mode: ``"batch"`` for FlagAI's random numbers, ``"per_image"`` for images independent of their batch.
            callback: Called with each sampler step.
            resume: Go on with the latest run of this very request in ``outpath``: draw what it lacks.
            comments: Leave out lines of ``from_file`` that begin with ``#``.
            out_path: The same as ``outpath``.
            ddim_step: The same as ``ddim_steps``.
            further: Any other option of ``GenerationRequest``: ``init_image``, ``strength``, ``mask_image`` and so on.

        Returns:
            The images with their paths, seeds and safety verdicts, and notes on what was changed or lost.

        Raises:
            InvalidRequestError: An argument outside its range; nothing was drawn or written.
            UnknownSamplerError: No such sampler.
            InsufficientMemoryError: A batch does not fit into memory; the message has one that does.
            NotFiniteError: Sampling gave no image.
            OutputError: An image cannot be saved; those saved before stay.
        """
        if plms and sampler not in (None, "plms"):
            raise InvalidRequestError("plms", True, f"contradicts sampler={sampler!r}; leave one of them out")
        self._check_latents(C=C, f=f)
        if from_file and has_requests(from_file):
            raise InvalidRequestError(
                "from_file",
                str(from_file),
                "JSON Lines are for altdiff generate; here a text with a prompt on each line",
            )
        drawing: dict[str, Any] = {
            "prompt": read_prompt_file(from_file, comments=comments) if from_file else prompt,
            "negative_prompt": negative_prompt,
            "H": H,
            "W": W,
            "ddim_steps": ddim_steps if ddim_step is None else ddim_step,
            "scale": scale,
            "sampler": sampler or ("plms" if plms else "ddim"),
            "ddim_eta": ddim_eta,
            "seed": seed,
            "seed_mode": seed_mode,
            "n_samples": n_samples,
            "n_iter": n_iter,
            "fixed_code": fixed_code,
        }
        further |= {} if grid is None else {"grid": grid}
        for name in further:
            if name not in _FURTHER:
                own = other_names(OPTIONS).get(name, name)
                known = [*_FURTHER, *drawing]
                near = [_FLAGAI[own]] if own in _FLAGAI else difflib.get_close_matches(name, known, n=1)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"predict_generate_images has no argument {name!r}{guess}")
        filing: dict[str, Any] = {
            "outpath": outpath if out_path is None else out_path,
            "n_rows": n_rows,
            "skip_save": skip_save,
            "skip_grid": skip_grid,
            "resume": resume,
        }
        options = {_NATIVE[name]: value for name, value in drawing.items()} | further
        if from_file:
            options |= {"images_per_prompt": 1, "batch_size": n_samples}
        try:
            request = GenerationRequest(**options)
            output = Output(**{_NATIVE[name]: value for name, value in filing.items()})
            return draw_to_folder(self.model, request, output, callback=callback)
        except InvalidRequestError as error:
            typed = _FLAGAI if ddim_step is None else {**_FLAGAI, "steps": "ddim_step"}
            raise InvalidRequestError(typed.get(error.field, error.field), error.value, error.expected) from None

    def _check_latents(self, **given: int | None) -> None:
        own = {"C": self.model.channels, "f": self.model.config.first_stage.downsampling}
        for name, value in given.items():
            if value not in (None, own[name]):
                raise InvalidRequestError(name, value, f"this model's is {own[name]}; leave {name} out")
