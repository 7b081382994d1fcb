"""Describe the operators, and the calls of known models, as a trace set of flashinfer-bench (0.1.2).

    python tools/make_traces.py OUT
    python tools/make_traces.py OUT --model qwen3-next --batches 1,64

OUT is a new folder, which ``flashinfer_bench.TraceSet.from_path`` reads::

    definitions/TYPE/NAME.json        axes, arguments, results, and a reference that needs PyTorch alone
    solutions/TYPE/NAME_cute_ssm.json the operator of this package
    workloads/TYPE/NAME.jsonl         a call for each batch size
    blob/workloads/...safetensors     arguments that must not be random, such as slots and decays

There is a definition for each call that `cute_ssm.workloads` declares for a model, where states are floating-point and
rounded to nearest.  It has the operator's arguments; those with the same value along an axis, such as A of Mamba-2, are
given without that axis.  Arguments that the operator updates are also results, called ``new_...``.  Nothing here is
measured: there are workloads, and no evaluations.  Needs the extra ``demo``, for safetensors.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import uuid
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trace_references
from safetensors.torch import save_file

import cute_ssm
from cute_ssm import workloads
from cute_ssm.errors import describe
from cute_ssm.ops._table import Table
from cute_ssm.workloads.maker import Maker

Keys = dict[str, "int | str"]
STATES = ("float32", "float16", "bfloat16")
OP_TYPES = {
    "selective_state_update": "mamba_ssu",
    "checkpointing_ssu": "mamba_ssu",
    "selective_scan": "mamba_scan",
    "gated_delta_rule_mtp": "gdn",
    "gated_delta_rule_replay": "gdn",
    "replay_decode": "mamba_ssu",
}
# Axes that tables of arguments call *name, by number of dimensions; and arguments that they have under other names.
STARS = {
    "*tokens": {1: "batch", 2: "batch T"},
    "*src": {1: "batch"},
    "*cache": {1: "batch"},
    "*rows": {2: "batch tokens"},
    "*channels": {2: "dim total", 3: "batch dim length"},
    "*columns": {3: "ngroups dstate total", 4: "batch ngroups dstate length"},
}
SHAPES = {
    "old_x": "slots W nheads dim",
    "old_B": "slots buffers W ngroups dstate",
    "old_dt": "slots buffers nheads W",
    "old_cumAdt": "slots buffers nheads W",
    "cache_buf_idx": "slots",
}
# Floating-point arguments that are not random.
GIVEN = ("A", "old_dt", "old_cumAdt", "dt_cache", "g_cache", "beta_cache")
NAMESPACE = uuid.UUID("6d1f3a52-9a55-5f0f-9f0c-6f0f6a0c6b5e")


class SmallValues(Maker):
    """Makes arguments of which those that `GIVEN` are have values, and others memory that is never touched."""

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device).to(dtype)


class Given(NamedTuple):
    """An argument as a definition has it: without the axes along which it has one value."""

    name: str
    axes: tuple[str, ...]
    stored: torch.Tensor
    expand: str  # code that restores the axes


def main(argv: list[str] | None = None) -> int:
    """Write the trace set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", choices=workloads.models(), help="calls of this model (default: of all)")
    parser.add_argument("--batches", default="1,16,64", help="numbers of requests (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.out.exists():
            raise ValueError(describe("out", "a folder that does not exist", str(options.out)))
        batches = tuple(int(number) for number in options.batches.split(","))
        calls = declared(options.model)
        for (op, keys), models in calls.items():
            write(options.out, op, dict(keys), models, batches)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(calls)} definitions, each with {len(batches)} workloads")
    return 0


def declared(model: str | None = None) -> dict[tuple[str, tuple[tuple[str, int | str], ...]], list[str]]:
    """Return the declared calls, as operators and parameters -> the models that make them."""
    found: dict[tuple[str, tuple[tuple[str, int | str], ...]], list[str]] = {}
    for name in workloads.models() if model is None else [model]:
        for load in workloads.of_model(name):
            keys = {**workloads.parameters(load.op), **dict(load.keys)}
            if keys["state_dtype"] in STATES and keys.get("rounding", "nearest") == "nearest":
                found.setdefault((load.op, load.keys), []).append(name)
    return found


def write(out: Path, op: str, keys: Keys, models: list[str], batches: tuple[int, ...]) -> None:
    """Write one definition, its solution, and its workloads."""
    trace = Trace(op, keys)
    definition = trace.definition([f"model:{model}" for model in models])
    folder = Path(OP_TYPES[op])
    _write_json(out / "definitions" / folder / f"{trace.name}.json", definition)
    _write_json(out / "solutions" / folder / f"{trace.name}_cute_ssm.json", trace.solution())
    lines = [json.dumps(trace.workload(out, batch)) for batch in batches]
    path = out / "workloads" / folder / f"{trace.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


class Trace:
    """One declared call of an operator, for any number of requests.

    Parameters
    ----------
    op : str
    keys : dict
        Parameters of the workload, without the number of requests.
    """

    def __init__(self, op: str, keys: Keys) -> None:
        self.op, self.keys = op, keys
        call = self._build(2)
        self.results = [name for name in call.written if isinstance(call.arguments.get(name), torch.Tensor)]
        if call.arguments.get("disable_state_update"):
            self.results = [name for name in self.results if name not in ("state", "initial_state")]
        self.buffers = [name for name in ("out", "output") if name in self.results]
        self.flags = {
            name: value
            for name, value in call.arguments.items()
            if value is not None and not isinstance(value, torch.Tensor)
        }
        self.inputs = self._given(call)
        small, large = self.sizes = [self._sizes(batch) for batch in (2, 3)]
        constant = [f"{axis}{size}" for axis, size in small.items() if size == large[axis] and axis != "buffers"]
        state = {**workloads.parameters(op), **keys}["state_dtype"]
        self.name = "_".join(
            [op, *sorted(constant), str(state), *(["z"] if call.arguments.get("z") is not None else [])]
        )

    def definition(self, tags: list[str]) -> dict[str, Any]:
        """Return the definition."""
        small, large = self.sizes
        axes = {
            axis: {"type": "const", "value": size} if size == large[axis] else {"type": "var"}
            for axis, size in small.items()
        }
        tensors = {given.name: _tensor(given.axes, given.stored.dtype) for given in self.inputs}
        outputs = {self._result(name): self._output(name) for name in self.results}
        variable = {axis for axis, value in axes.items() if value["type"] == "var"}
        return {
            "name": self.name,
            "op_type": OP_TYPES[self.op],
            "tags": ["stage:prefill" if self.op == "selective_scan" else "stage:decode", *tags],
            "description": f"{workloads.public_name(self.op)}: {_summary(self.op)}",
            "axes": axes,
            "constraints": ["slots >= batch"] if {"slots", "batch"} <= variable else [],
            "inputs": tensors,
            "outputs": outputs,
            "reference": self.reference(),
        }

    def reference(self) -> str:
        """Return code that needs PyTorch alone and modifies no argument."""
        parts = [
            f'"""{_summary(self.op)}\n\nFrom the reference of cute_ssm {cute_ssm.__version__}, Apache-2.0.\n"""',
            "from __future__ import annotations\n\nfrom collections.abc import Sequence\nfrom typing import Any, "
            "NamedTuple\n\nimport torch\nfrom torch import Tensor",
        ]
        for name, value in trace_references.EMBEDDED[self.op].items():
            parts.append(_source(value, name) if callable(value) else f"{name} = {value!r}")
        parts.append(inspect.getsource(getattr(trace_references, self.op)).strip())
        results = ", ".join(f"results[{name!r}]" for name in self.results)
        parts.append("\n".join([self._head(), f"    results = {self.op}({self._call()})", f"    return {results}"]))
        return "\n\n\n".join(parts) + "\n"

    def solution(self) -> dict[str, Any]:
        """Return the solution: a call of the operator, which updates states and histories in place."""
        name = workloads.public_name(self.op)
        imported = f"import torch\n\nimport {name.rpartition('.')[0]}"
        text = [f'"""{name}, which updates its arguments in place."""', imported]
        body = [self._head()]
        body += [f"    {name} = {self._allocation(name)}" for name in self.buffers]
        call = ", ".join([self._call(), *(f"{name}={name}" for name in self.buffers)])
        body += [f"    {name}({call})", f"    return {', '.join(self.results)}"]
        return {
            "name": f"{self.name}_cute_ssm",
            "definition": self.name,
            "author": "cute_ssm",
            "description": f"The operator of cute_ssm {cute_ssm.__version__}, compiled at its first call.",
            "spec": {
                "language": "python",
                "target_hardware": ["NVIDIA H100", "NVIDIA H200", "NVIDIA B200", "NVIDIA B300"],
                "entry_point": "main.py::run",
                "dependencies": ["cute-ssm"],
                "destination_passing_style": False,
            },
            "sources": [{"path": "main.py", "content": "\n\n".join([*text, "\n" + "\n".join(body)]) + "\n"}],
        }

    def workload(self, out: Path, batch: int) -> dict[str, Any]:
        """Return the workload of a number of requests; write its arguments that are not random below `out`."""
        name = str(uuid.uuid5(NAMESPACE, f"{self.name} {batch}"))
        given = self._given(self._build(batch))
        fixed = {g.name: g.stored.contiguous() for g in given if g.name in GIVEN or not g.stored.is_floating_point()}
        path = Path("blob", "workloads", OP_TYPES[self.op], self.name, f"{self.name}_{name}.safetensors")
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(fixed, out / path)
        inputs = {
            g.name: {"type": "safetensors", "path": path.as_posix(), "tensor_key": g.name}
            if g.name in fixed
            else {"type": "random"}
            for g in given
        }
        small, large = self.sizes
        sizes = self._sizes(batch)
        axes = {axis: size for axis, size in sizes.items() if small[axis] != large[axis]}
        return {"definition": self.name, "workload": {"uuid": name, "axes": axes, "inputs": inputs}}

    def _build(self, batch: int) -> workloads.Call:
        keys: dict[str, Any] = {**self.keys, workloads.batch_key(self.op): batch}
        return workloads.registered(self.op)(SmallValues("cpu", fill=False), **keys)

    def _given(self, call: workloads.Call) -> list[Given]:
        table = _table(self.op)
        found = []
        for name, tensor in call.arguments.items():
            if not isinstance(tensor, torch.Tensor) or name in self.buffers:
                continue
            axes = _axes(table, name, tensor)
            kept = [size == 1 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride())]
            stored = tensor[tuple(slice(None) if keep else 0 for keep in kept)]
            index = ", ".join(":" if keep else "None" for keep in kept)
            sizes = ", ".join("-1" if keep else str(size) for keep, size in zip(kept, tensor.shape))
            expand = "" if all(kept) else f"{name} = {name}[{index}].expand({sizes})"
            found.append(Given(name, tuple(axis for axis, keep in zip(axes, kept) if keep), stored, expand))
        return found

    def _sizes(self, batch: int) -> dict[str, int]:
        """Return the sizes of all axes."""
        found: dict[str, int] = {}
        call = self._build(batch)
        for given in [*self._given(call), *(self._buffer(call, name) for name in self.buffers)]:
            for axis, size in zip(given.axes, given.stored.shape):
                if found.setdefault(axis, size) != size:
                    raise ValueError(describe(f"axis {axis} of {given.name}", str(found[axis]), size))
        return found

    def _buffer(self, call: workloads.Call, name: str) -> Given:
        tensor = call.arguments[name]
        return Given(name, _axes(_table(self.op), name, tensor), tensor, "")

    def _output(self, name: str) -> dict[str, Any]:
        found = self._buffer(self._build(2), name)
        return _tensor(found.axes, found.stored.dtype)

    def _result(self, name: str) -> str:
        return name if name in self.buffers else f"new_{name}"

    def _head(self) -> str:
        lines = [f"def run({', '.join(given.name for given in self.inputs)}):"]
        return "\n".join([*lines, *(f"    {given.expand}" for given in self.inputs if given.expand)])

    def _call(self) -> str:
        names = [f"{given.name}={given.name}" for given in self.inputs]
        return ", ".join(names + [f"{name}={value!r}" for name, value in self.flags.items()])

    def _allocation(self, name: str) -> str:
        """Return code that makes memory for a result: each axis is that of the first argument that has it."""
        buffer = self._buffer(self._build(2), name)
        small, large = self.sizes
        sizes = []
        for axis in buffer.axes:
            owner = next(given for given in self.inputs if axis in given.axes)
            constant = small[axis] == large[axis]
            sizes.append(str(small[axis]) if constant else f"{owner.name}.shape[{owner.axes.index(axis)}]")
        device = self.inputs[0].name
        return f"torch.empty({', '.join(sizes)}, dtype={buffer.stored.dtype}, device={device}.device)"


def _table(op: str) -> Table:
    table: Table = import_module(f"cute_ssm.ops.{op}.arguments").TABLE
    return table


def _axes(table: Table, name: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """Return the names of a tensor's axes."""
    declared = SHAPES[name].split() if name in SHAPES else list(table.tensors[name].axes)
    starred = [axis for axis in declared if axis in STARS]
    for axis in starred:
        at = declared.index(axis)
        declared[at : at + 1] = STARS[axis][tensor.dim() - len(declared) + 1].split()
    return tuple(axis.replace("+1", "_plus_1") for axis in declared)


def _tensor(axes: tuple[str, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(axes), "dtype": str(dtype).removeprefix("torch.")}


def _summary(op: str) -> str:
    return (inspect.getdoc(workloads.function(op)) or "").split("\n\n")[0].replace("\n", " ")


def _source(value: Any, name: str) -> str:
    """Return the source of a function or class, under another name."""
    text = inspect.getsource(value).strip()
    return re.sub(rf"^(def|class) {value.__name__}\b", rf"\1 {name}", text)


if __name__ == "__main__":
    sys.exit(main())
