"""Errors as answers: the status and the words, in the form that the clients of each interface read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, UnknownModelError, UnknownSamplerError
from flagai_altdiff.web.jobs import JobError
from flagai_altdiff.web.messages import Problem
from flagai_altdiff.web.service import BusyError

_STATUS = {
    "invalid_request": 400,
    "not_found": 404,
    "model_not_found": 404,
    "cancelled": 409,
    "interrupted": 503,
    "stopping": 503,
    "busy": 429,
    "disk": 507,
}
"""Status of a problem, by its code; 500 for all others."""
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {429: "rate_limit_error"}
_A1111 = "/sdapi/"
_THEIR_NAMES = {
    "/v1/": {"prompts": "prompt", "images_per_prompt": "n", "init_image": "image", "mask_image": "mask"},
    _A1111: {
        "prompts": "prompt",
        "images_per_prompt": "n_iter",
        "guidance_scale": "cfg_scale",
        "sampler": "sampler_name",
        "grid": "scheduler",
        "strength": "denoising_strength",
        "variation_strength": "subseed_strength",
        "variation_seed": "subseed",
        "mask_feather": "mask_blur",
        "mask_padding": "inpaint_full_res_padding",
        "hires": "hr_scale",
        "hires_strength": "denoising_strength",
    },
}
"""What the interfaces call our options, so that an error names what was typed."""


def status_of(problem: Problem) -> int:
    """The HTTP status of a problem."""
    return _STATUS.get(problem.code, 500)


def problem_of(error: Exception) -> Problem:
    """What to say of an error."""
    if isinstance(error, JobError):
        return error.problem
    if isinstance(error, BusyError):
        return Problem(code="stopping" if error.is_stopping else "busy", text=str(error))
    if isinstance(error, UnknownModelError):
        return Problem(code="model_not_found", text=str(error), field="model")
    if isinstance(error, UnknownSamplerError):
        return Problem(code="invalid_request", text=str(error), field="sampler")
    return Problem.of(error)


def error_answer(path: str, status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A problem in the words of an interface.

    Args:
        path: Which one: A1111's has its own form; ours is OpenAI's.
        status: Of the answer.
        problem: What is wrong.
        headers: To add.
    """
    body: dict[str, Any]
    if path.startswith(_A1111):
        body = {"error": problem.code, "detail": problem.text, "body": "", "errors": problem.text}
    else:
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        own = {"message": problem.text, "type": kind, "param": problem.field or None, "code": problem.code}
        body = {"error": own}
    return JSONResponse(body, status, dict(headers or {}))


def answer_to(path: str, error: Exception) -> JSONResponse:
    """The answer to an exception."""
    if isinstance(error, InvalidRequestError):
        names = next((names for prefix, names in _THEIR_NAMES.items() if path.startswith(prefix)), {})
        error = InvalidRequestError(names.get(error.field, error.field), error.value, error.expected)
    problem = problem_of(error)
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, BusyError) else {}
    return error_answer(path, status_of(problem), problem, headers)


EXPECTED: tuple[type[Exception], ...] = (FlagAIAltDiffError, JobError, BusyError, InvalidRequestError)
"""What is answered with its own words; anything else is a bug, and logged."""
