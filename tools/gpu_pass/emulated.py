"""The emulator's results of small calls, computed beforehand into one small file, and a GPU's beside them.

Inputs are made on the CPU from a seed, so the file holds results alone: of each tensor that a call writes a digest of
all bytes, and at a few thousand places, spread over what the call changed, the emulator's bits and the reference's.

The verdict is by errors: the root mean square of the distance to the reference may be 1.5 times that of the emulator,
or what a hundredth of the values rounded the other way would give, whichever is more.  Equal bits are reported and
decide nothing: approximate instructions differ in their last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_calls import Made

from gpu_pass import calls
from gpu_pass.records import Item, Wrong

FORM = 1
PLACES = 2048
FACTOR, FLIPPED = 1.5, 0.01


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return a digest of names, types, shapes and bytes."""
    hasher = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        hasher.update(raw(value).tobytes())
    return hasher.hexdigest()[:16]


def raw(value: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor, a row for each element."""
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint8).reshape(-1, value.element_size()).numpy()


def inputs(call: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a call is given, without those that it only writes."""
    named = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in named.items() if name not in ("out", "output", *EMPTY)}


EMPTY = ("intermediate_states_buffer", "intermediate_state_scales")  # not initialised


def write(
    path: Path, arch: str, sm_count: int, arithmetic: str = "exact", named: Sequence[Made] | None = None,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Run calls by the reference and in the emulator, and write the file.

    Parameters
    ----------
    arch, sm_count
        Of the GPU that is emulated.  The verdict is by errors, so one with other SMs may be held against it.
    arithmetic : str
        Of ``ptxsim.emulate``.
    """
    import ptxsim

    options = {} if arithmetic == "exact" else {"arithmetic": arithmetic}
    rows, arrays = [], {}
    for number, one in enumerate(named or calls.every_mode()):
        here, there = one._replace(arguments=()).build(), one.build()
        given, before = digest(inputs(here)), calls.clones(here)
        here.run()
        with ptxsim.emulate(arch=arch, sm_count=sm_count, **options):
            there.run()
        row: dict[str, Any] = {"name": one.text(), "inputs": given, "outputs": {}}
        for name, value in there.results().items():
            wanted = here.results()[name]
            places = changed_places(before[name], wanted, name in ("out", "output", *EMPTY))
            key = f"{number}/{name}"
            arrays[f"{key}/places"] = places.astype(np.int32)
            arrays[f"{key}/emulator"], arrays[f"{key}/reference"] = raw(value)[places], raw(wanted)[places]
            row["outputs"][name] = {
                "key": key, "dtype": str(value.dtype).removeprefix("torch."), "bytes": digest({name: value}),
            }  # fmt: skip
        rows.append(row)
        say(f"{one.text()}: emulated")
    about = {"form": FORM, "arch": arch, "sm_count": sm_count, "arithmetic": arithmetic, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=json.dumps(about), **arrays)


def changed_places(before: torch.Tensor, after: torch.Tensor, everywhere: bool) -> np.ndarray:
    """Return places of elements, spread evenly over those that a call changed."""
    changed = (raw(before) != raw(after)).any(-1)
    found = np.arange(len(changed)) if everywhere else np.flatnonzero(changed)
    return found[np.unique(np.linspace(0, len(found) - 1, min(PLACES, len(found))).astype(np.int64))]


class Stored:
    """The file.

    Raises
    ------
    ValueError
        It is of another form, or for another target.
    """

    def __init__(self, path: Path, arch: str | None = None):
        with np.load(path) as arrays:
            self.arrays = dict(arrays)
        self.about = json.loads(str(self.arrays.pop("about")))
        made = self.about["arch"]
        if self.about["form"] != FORM or arch not in (None, made):
            raise ValueError(
                f"{path.name}: expected results of form {FORM} for {arch}, got form {self.about['form']} for {made}; "
                "make it anew: gpu_check.py emulate"
            )
        self.rows = {row["name"]: row for row in self.about["rows"]}

    def compare(self, made: Made, device: str = "cuda") -> dict[str, Any]:
        """Run a call and compare; return errors and shares of equal bits.

        Raises
        ------
        Wrong
            Inputs are others, or an error is too large.
        """
        row, call = self.rows[made.text()], calls.made_on(made, device)
        if digest(inputs(call)) != row["inputs"]:
            raise Wrong("the inputs made from the seed are not those of the file: another generator of random numbers")
        call.run()
        found = {name: self._output(value, row["outputs"][name]) for name, value in call.results().items()}
        worst = max(found.values(), key=lambda one: one["ratio"])
        for name, one in found.items():
            if not one["ratio"] <= 1:
                raise Wrong(
                    f"{name}: its rms error is {one['rms']:.3g}, that of the emulator {one['emulator_rms']:.3g}, "
                    f"allowed {one['allowed']:.3g}", max_error=one["max_error"], outputs=found,
                )  # fmt: skip
        return {"max_error": max(one["max_error"] for one in found.values()), "ratio": worst["ratio"], "outputs": found}

    def _output(self, value: torch.Tensor, row: dict[str, Any]) -> dict[str, Any]:
        places = self.arrays[f"{row['key']}/places"]
        emulator, reference = (self._values(row, part) for part in ("emulator", "reference"))
        bits = raw(value)[places]
        got = self._as_values(bits, row["dtype"])
        judged = verdict(got, emulator, reference, row["dtype"])
        equal = float((bits == self.arrays[f"{row['key']}/emulator"]).all(-1).mean()) if len(bits) else 1.0
        return {**judged, "equal": equal, "all_bytes_equal": digest({row["key"].split("/")[1]: value}) == row["bytes"]}

    def _values(self, row: dict[str, Any], part: str) -> np.ndarray:
        return self._as_values(self.arrays[f"{row['key']}/{part}"], row["dtype"])

    @staticmethod
    def _as_values(bits: np.ndarray, dtype: str) -> np.ndarray:
        if not len(bits):  # of a tensor that the call leaves as it is
            return np.zeros(0)
        return torch.from_numpy(np.ascontiguousarray(bits)).view(getattr(torch, dtype)).flatten().double().numpy()


def verdict(got: np.ndarray, emulator: np.ndarray, reference: np.ndarray, dtype: str) -> dict[str, float]:
    """Return rms errors against the reference, and the ratio of the GPU's to what is allowed: above 1 it is wrong."""
    if not np.array_equal(np.isfinite(got), np.isfinite(reference)):
        return {
            "rms": float("inf"),
            "emulator_rms": 0.0,
            "allowed": 0.0,
            "max_error": float("inf"),
            "ratio": float("inf"),
        }
    finite = np.isfinite(reference)
    if not finite.any():
        return {"rms": 0.0, "emulator_rms": 0.0, "allowed": 0.0, "max_error": 0.0, "ratio": 0.0}
    got, emulator, reference = got[finite], emulator[finite], reference[finite]
    kind = getattr(torch, dtype)
    size = float(np.sqrt(np.mean(np.square(reference))))
    step = torch.finfo(kind).eps * size if kind.is_floating_point else 1.0
    rms, other = (float(np.sqrt(np.mean(np.square(one - reference)))) for one in (got, emulator))
    allowed = max(FACTOR * other, np.sqrt(FLIPPED) * step, 2.0**-22 * size)
    largest = float(np.abs(got - reference).max() / max(np.abs(reference).max(), 1e-30))
    return {
        "rms": rms,
        "emulator_rms": other,
        "allowed": float(allowed),
        "max_error": largest,
        "ratio": rms / max(allowed, 1e-300),
    }


def items(path: Path) -> list[Item]:
    """Return the comparisons of all calls of a file."""
    from cute_ssm import arch as archs

    stored = Stored(path, archs.of_device(torch.device("cuda", torch.cuda.current_device())).name)
    known = {made.text(): made for made in calls.every_mode()}
    return [Item(name, lambda one=known[name]: stored.compare(one)) for name in stored.rows if name in known]
