"""Comparison of values within bounds.  A failure names the first index out of bounds, got, wanted and bound.

Tracebacks end in the test, or in the function that called these (``__tracebackhide__``); ``--full-trace`` shows all.
"""

from __future__ import annotations

import numpy as np
import torch


def double(values: object) -> np.ndarray:
    """Values of any type that this package knows, as float64."""
    return values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, float)


def within(got: object, want: object, bound: object, what: str) -> None:
    """Assert that each ``|got - want| <= bound``; a NaN anywhere is an error.

    Parameters
    ----------
    got, want, bound : Tensor or array
        `bound` may be broadcast.
    what : str
        Name of what is compared.
    """
    __tracebackhide__ = True
    got, want = double(got), double(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, wanted {want.shape}"
    bound = np.broadcast_to(double(bound), got.shape)
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(got - want) <= bound)
    if bad.any():
        at = tuple(np.argwhere(bad)[0].tolist())
        raise AssertionError(
            f"{what}{list(at)}: got {got[at]:.9g}, wanted {want[at]:.9g}, error {abs(got[at] - want[at]):.3g} exceeds "
            f"the bound {bound[at]:.3g}; so do {int(bad.sum())} of {bad.size}"
        )


def rms_within(error: float, bound: float, what: str) -> None:
    """Assert that the root mean square of errors is within its bound."""
    __tracebackhide__ = True
    assert error <= bound, (
        f"{what}: each element is within its bound, but the rms error {error:.3g} exceeds {bound:.3g}"
    )


def like_float32(
    got: list,
    rounded: list,
    want: list,
    unit: list,
    what: list[str],
    approximate: list | None = None,
    lost: list | None = None,
) -> None:
    """Assert that errors are at most 1.5 times those of a float32 computation, in each element and in mean square.

    What the hardware's approximate functions and sums of tensor cores add is allowed besides.

    Errors count in units.  What a float32 computation could not promise is always allowed: ``2**-22`` units in an
    element, ``2**-24`` in mean square.

    Parameters
    ----------
    got : list of Tensor
        The parts of a result, whose errors are judged together.
    rounded : list of Tensor
        What float32 computes, rounded to the type of `got`.
    want : list of Tensor
        What float64 computes.
    unit : list of Tensor
        Unit of the errors, for each element.
    what : list of str
        Names of the parts.
    approximate : list of Tensor, optional
        What approximate functions may change each element by: `approximations`.  Default: nothing.
    lost : list of tensor_sums.Loss, optional
        What sums of tensor cores lose of each element.  Default: nothing.
    """
    __tracebackhide__ = True
    nothing = [0.0] * len(got)
    most, mean = ([loss[i] for loss in lost] if lost is not None else nothing for i in range(2))
    extras = (approximate if approximate is not None else nothing, most, mean)
    parts = []
    for *part, changed, at_most, in_mean in zip(got, rounded, want, unit, *extras, strict=True):
        g, r, w, u = (double(t) for t in part)
        shift = [np.broadcast_to(double(t), w.shape) for t in (changed, at_most, in_mean)]
        parts.append((g, r, w, u, shift[0] + shift[1], shift[0] + shift[2]))
    allowed = np.concatenate([(np.abs(r - w) / u).ravel() for _, r, w, u, _, _ in parts])
    more = np.concatenate([(e / u).ravel() for _, _, _, u, _, e in parts])
    mean = np.sqrt(np.mean(np.square(allowed)))
    limit = 1.5 * max(allowed.max(), mean) + 2.0**-22
    for name, (g, _, w, u, e, _) in zip(what, parts, strict=True):
        within(g, w, limit * u + e, name)
    errors = np.concatenate([(np.abs(g - w) / u).ravel() for g, _, w, u, *_ in parts])
    limit = 1.5 * mean + 2.0**-24 + np.sqrt(np.mean(np.square(more)))
    rms_within(np.sqrt(np.mean(np.square(errors))), limit, f"{what[0]} (in its units)")
