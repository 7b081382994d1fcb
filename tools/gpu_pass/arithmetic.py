"""Errors of the GPU's approximate functions and of its matrix sums, over a million inputs each.

Results are histograms of errors in units in the last place of the exact result, with the inputs of the worst, and a
file of samples: inputs and the GPU's bits.  ``fit`` holds them against the arithmetic that the emulator assumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cute_ssm import runtime
from gpu_pass import probes
from gpu_pass.records import Item

SAMPLES = 4096  # whose bits are kept
BIN = 0.0625  # of a histogram, in ulp
# of each function: the range of inputs, and whether their logarithms are uniform
RANGES = {"ex2": [(-126.0, 126.0, False), (-1.0, 1.0, False)], "rcp": [(2.0**-100, 2.0**100, True), (1.0, 2.0, False)]}
RANGES |= {"rsqrt": [(2.0**-100, 2.0**100, True), (1.0, 4.0, False)]}
RANGES |= {"lg2": [(2.0**-100, 2.0**100, True), (0.5, 2.0, False)]}
EXACT = {"ex2": np.exp2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "lg2": np.log2}


def ulp(values: np.ndarray) -> np.ndarray:
    """Return the unit in the last place of float32 at exact values, that of the smallest normal number at least."""
    exponent = np.frexp(np.abs(values))[1] - 1
    return np.exp2(np.maximum(exponent, -126) - 23.0)


def approximate_inputs(count: int, part: int, seed: int = 0) -> torch.Tensor:
    """Return inputs (functions, count), float32, of each function's range number `part`."""
    generator = np.random.default_rng(seed)
    rows = []
    for name in probes.FUNCTIONS:
        low, high, logarithmic = RANGES[name][part]
        u = generator.random(count)
        rows.append(np.exp2(np.log2(low) + u * np.log2(high / low)) if logarithmic else low + u * (high - low))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def histogram(errors: np.ndarray) -> dict[str, Any]:
    """Return counts by bins of `BIN` ulp, named by their lower edge, and what sums them up."""
    edges, counts = np.unique(np.floor(errors / BIN), return_counts=True)
    return {
        "bins": {f"{edge * BIN:g}": int(count) for edge, count in zip(edges, counts)}, "count": len(errors),
        "max": float(errors.max()), "min": float(errors.min()), "mean": float(errors.mean()),
        "rms": float(np.sqrt(np.mean(np.square(errors)))), "exact": float((np.abs(errors) <= 0.5).mean()),
    }  # fmt: skip


def approximate(count: int, part: int, out: Path, device: str) -> dict[str, Any]:
    """Run the approximate functions, and return a histogram of each."""
    x = approximate_inputs(count, part)
    given, result = x.to(device), torch.empty_like(x).to(device)
    _kernel(probes.ApproximateSpec(), device)(given, result)
    got, found = result.cpu().numpy().astype(np.float64), {}
    for f, name in enumerate(probes.FUNCTIONS):
        exact = EXACT[name](x[f].numpy().astype(np.float64))
        errors = (got[f] - exact) / ulp(exact)
        worst = int(np.abs(errors).argmax())
        found[name] = {**histogram(errors), "range": RANGES[name][part], "worst_input": float(x[f, worst])}
    step = max(1, count // SAMPLES)
    np.savez_compressed(
        out / f"approximate-{part}.npz", inputs=x[:, ::step].numpy(), outputs=result.cpu()[:, ::step].numpy()
    )
    return {"functions": found}


def matrix_inputs(count: int, operands: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return matrices A (count, 16, k), B (count, k, 8), C (count, 16, 8), float32; A and B are exact in the type.

    Magnitudes differ by 2^8 among the elements of an instruction: what is cut off when terms are aligned shows.
    """
    k = 8 if operands == "tf32" else 16
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        scale = torch.exp2(torch.randint(-4, 5, shape, generator=generator).float())
        return torch.randn(*shape, generator=generator) * scale

    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(operands)
    made = [normal(count, 16, k), normal(count, k, 8)]
    if kind is not None:
        made = [one.to(kind).float() for one in made]
    else:
        made = [(one.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for one in made]
    return *made, 4 * normal(count, 16, 8)


def fragments(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, operands: str) -> tuple[torch.Tensor, ...]:
    """Return the words of A and B and the floats of C as lanes hold them: see `cute_ssm.device.mma`."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    if operands == "tf32":
        rows, columns = torch.stack([g, g + 8, g, g + 8], -1), torch.stack([t, t, t + 4, t + 4], -1)
        words_a = a[:, rows, columns].contiguous().view(torch.int32)
        words_b = b[:, torch.stack([t, t + 4], -1), g[:, None].expand(-1, 2)].contiguous().view(torch.int32)
    else:
        kind = torch.float16 if operands == "float16" else torch.bfloat16
        pair = torch.arange(2)
        rows = torch.stack([g, g + 8, g, g + 8], -1)[..., None].expand(-1, -1, 2)
        columns = (torch.stack([2 * t, 2 * t, 2 * t + 8, 2 * t + 8], -1)[..., None]) + pair
        words_a = a.to(kind)[:, rows, columns].contiguous().view(torch.int32)[..., 0]
        inner = torch.stack([2 * t, 2 * t + 8], -1)[..., None] + pair
        words_b = b.to(kind)[:, inner, g[:, None, None].expand(-1, 2, 2)].contiguous().view(torch.int32)[..., 0]
    at_rows, at_columns = _of_sums()
    return words_a, words_b, c[:, at_rows, at_columns].contiguous()


def _of_sums() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of C and D that lanes hold."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    return torch.stack([g, g, g + 8, g + 8], -1), torch.stack([2 * t, 2 * t + 1, 2 * t, 2 * t + 1], -1)


def matrix(count: int, operands: str, out: Path, device: str) -> dict[str, Any]:
    """Run matrix instructions that give ``128 count`` sums, and return a histogram of their errors.

    An error counts in units in the last place of the largest term: so terms are aligned before they are added.
    """
    a, b, c = matrix_inputs(count, operands)
    words_a, words_b, sums = fragments(a, b, c, operands)
    given = [one.to(device) for one in (words_a, words_b, sums)]
    result = torch.empty_like(sums).to(device)
    _kernel(probes.MatrixSpec(operands), device)(*given, result)
    rows, columns = _of_sums()
    terms = torch.cat([(a.double()[:, :, :, None] * b.double()[:, None]).movedim(2, 0), c.double()[None]])
    exact = terms.sum(0)[:, rows, columns].numpy()
    largest = terms.abs().amax(0)[:, rows, columns].numpy()
    got = result.cpu().numpy()
    errors = ((got.astype(np.float64) - exact) / ulp(largest)).ravel()
    kept = slice(None, max(1, SAMPLES // 128))
    np.savez_compressed(
        out / f"matrix-{operands}.npz", a=a[kept].numpy(), b=b[kept].numpy(), c=c[kept].numpy(), d=got[kept],
        rows=rows.numpy(), columns=columns.numpy(),
    )  # fmt: skip
    return {"operands": operands, **histogram(errors)}


def _kernel(spec: Any, device: str) -> Any:
    probes.register()
    return runtime.get(spec, probes.ProbeConfig()) if device != "cpu" else runtime.emulated(spec)


def items(count: int, out: Path, device: str = "cuda") -> list[Item]:
    """Return the measurements over ``count`` inputs each; on the device "cpu", for an emulator that is open."""
    found = [
        Item(f"matrix {operands}", lambda o=operands: matrix(max(1, count // 128), o, out, device))
        for operands in probes.OPERANDS
    ]
    for part in range(2):
        found.append(Item(f"approximate {part}", lambda p=part: approximate(count, p, out, device)))
    return found
