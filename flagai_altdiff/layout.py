"""How a drawing is laid out in windows, and how many pixels a step computes then. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling.windows import Window, cells_in_windows, make_windows


def windows_of(request: ResolvedRequest, cell: int, shape: Sequence[int]) -> list[Window] | None:
    """The windows of a latent, (h, w); ``None`` where it is drawn whole.

    Args:
        request: What is drawn.
        cell: Pixels per latent cell.
        shape: Of the latent.
    """
    found = _side_and_stride(request, cell, shape)
    return make_windows(shape, *found, **wraps_of(request)) if found else None


def pixels_of_a_step(request: ResolvedRequest, cell: int) -> int:
    """Pixels that the larger pass computes in a step: in each window that they lie in.

    Args:
        request: What is drawn.
        cell: Pixels per latent cell.
    """
    sizes = [(request.width, request.height), *([request.final_size] if request.hires else [])]
    return max(_pixels(request, cell, *size) for size in sizes)


def _pixels(request: ResolvedRequest, cell: int, width: int, height: int) -> int:
    shape = (height // cell, width // cell)
    found = _side_and_stride(request, cell, shape)
    return cells_in_windows(shape, *found, **wraps_of(request)) * cell**2 if found else width * height


def _side_and_stride(request: ResolvedRequest, cell: int, shape: Sequence[int]) -> tuple[int, int] | None:
    side = (request.window or 0) // cell
    if not side or (side >= max(shape) and not request.stretches and not any(wraps_of(request).values())):
        return None
    return side, max(side - (request.window_overlap or 0) // cell, 1)


def circular_axes(request: ResolvedRequest) -> str:
    """Along which sides the model itself must see the opposite edge: where windows do not go over it."""
    sides = dict(zip("xy", request.final_size if request.hires else (request.width, request.height), strict=True))
    return "".join(a for a in sides if a in request.seamless and not (request.window and request.window < sides[a]))


def wraps_of(request: ResolvedRequest) -> dict[str, bool]:
    """Over which edges windows and tiles go: where the model itself does not look over them, in any pass."""
    axes = set(request.seamless) - set(circular_axes(request))
    return {"wraps_y": "y" in axes, "wraps_x": "x" in axes}
