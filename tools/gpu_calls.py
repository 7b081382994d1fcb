"""What a GPU pass calls, and the kernels of these calls, which the kit holds: one list for both.

``tools/gpu_check.py`` makes these calls on the GPU machine, where there is no compiler; ``tools/make_kit.sh`` compiles
their kernels before, by ``python tools/gpu_calls.py kernels.json --tests``, a file of specs for ``tools/build_aot.py``.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gpu_pass import probes  # noqa: E402

from cute_ssm import arch as archs  # noqa: E402
from cute_ssm import runtime, workloads  # noqa: E402
from cute_ssm.ops import operators  # noqa: E402
from cute_ssm.tuner import problems, search  # noqa: E402
from cute_ssm.workloads import plan  # noqa: E402

BATCHES = (1, 16, 64, 512)  # of the calls that are timed
CANDIDATES = 40  # configs of a call that is tuned, at most
# what runs no kernel is left out, and pools of 34 GB, which several processes cannot copy to one GPU at a time
SELECTED = "not test_reference and not configuration_of_the_reference and not slots_beyond"


def tests() -> list[str]:
    """Return paths for ``pytest --gpu``: what needs a GPU, then each operator beside its oracle."""

    def depth(path: Path) -> tuple[int, Path]:
        return len(path.parts), path

    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests").rglob("test_*gpu.py"), key=depth)]
    for operator in operators():
        folder = f"tests/ops/{operator.name}"
        own = f"{folder}/test_{operator.name}.py"
        found += [path for path in (own, folder) if (ROOT / path).exists()][:1]
    return found


class Made(NamedTuple):
    """A call: operator, parameters of `workloads.build`, and arguments that are changed after it.

    `arguments` is a tuple of pairs, as in ``(("enable_pdl", True),)``.
    """

    op: str
    keys: dict[str, Any]
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self, device: Any = "cpu", fill: bool = True, seed: int = 0) -> workloads.Call:
        """Return the call on random arguments."""
        call = workloads.build(self.op, self.keys, device, fill, seed)
        call.arguments.update(self.arguments)
        return call

    def text(self) -> str:
        """Return the operator and what differs from the defaults, as on the command line."""
        return " ".join([self.op, *(f"{name}={value}" for name, value in (*self.keys.items(), *self.arguments))])


def base(op: str) -> Made:
    """Return the smallest call of an operator."""
    return Made(op, workloads.tiny(op))


def modes(op: str | None = None) -> list[Made]:
    """Return small calls, one for every mode and type of every operator, or of one."""
    chosen = [name for name in workloads.OPERATORS if op in (None, name)]
    return [Made(name, keys) for name in chosen for keys in workloads.modes(name)]


def checked() -> list[Made]:
    """Return the small calls that `workloads` declares, those of tests/test_gpu.py among them."""
    small = [Made(op, {**workloads.small(op), workloads.batch_key(op): 3}) for op in workloads.OPERATORS]
    return [*(Made(op, keys) for op in workloads.OPERATORS for keys in workloads.checked(op)), *small]


def timed(op: str | None = None) -> list[Made]:
    """Return the models' calls at `BATCHES`, or at the usual batches of an operator that takes fewer."""
    found = []
    for name in workloads.OPERATORS:
        if op in (None, name):
            for workload in workloads.of_operator(name):
                usual = [batch for batch in workload.batches if batch in BATCHES]
                chosen = usual if len(usual) > 1 else workload.batches
                key = workloads.batch_key(name)
                found += [Made(name, {**dict(workload.keys), key: batch}) for batch in chosen]
    return found


def dependent() -> list[Made]:
    """Return calls that wait for the kernel ahead of them, of the operators that have the choice (``enable_pdl``)."""
    found = []
    for op in workloads.OPERATORS:
        if "enable_pdl" in inspect.signature(workloads.function(op)).parameters:
            found += [base(op)._replace(arguments=(("enable_pdl", wait),)) for wait in (True, "early_reads")]
            found += [call._replace(arguments=(("enable_pdl", True),)) for call in timed(op)]
    return found


def tuned(arch: archs.Arch, sm_count: int | None = None) -> list[problems.Problem]:
    """Return what is tuned: one call of each operator, in the upper third of its usual batches."""
    found = []
    for op in workloads.OPERATORS:
        first = workloads.of_operator(op)[0]
        batch = first.batches[2 * (len(first.batches) // 3)]
        found.append(problems.problem(op, {**dict(first.keys), workloads.batch_key(op): batch}, arch, sm_count))
    return found


def candidates(problem: problems.Problem) -> list[problems.Fields]:
    """Return the configs that a search from the rule's tries first, `CANDIDATES` at most, the rule's own first."""
    rule = problem.rule()
    found = [rule]
    for names in search.blocks(problem.space):
        for values in itertools.product(*(problem.space[name] for name in names)):
            fields = {**rule, **dict(zip(names, values))}
            if fields not in found and problem.valid(fields):
                found.append(fields)
    return found[:CANDIDATES]


def of_calls(made: Iterable[Made], arch: archs.Arch, sm_count: int | None = None) -> list[plan.Kernel]:
    """Return the distinct kernels of calls."""
    found: list[plan.Kernel] = []
    for call in made:
        with runtime.planned(arch, sm_count) as planned:
            call.build(fill=False).run()
        found += planned.kernels
    return list(dict.fromkeys(found))


def around(arch: archs.Arch, sm_count: int | None = None) -> Iterator[plan.Kernel]:
    """Yield the kernels that an engine runs around the models' calls."""
    for op in workloads.OPERATORS:
        for workload in workloads.of_operator(op, BATCHES):
            yield from plan.around(workload, arch, sm_count)


def kernels(arch: archs.Arch, sm_count: int | None = None) -> list[plan.Kernel]:
    """Return the distinct kernels of everything above, and those that measure arithmetic."""
    found = of_calls([*modes(), *checked(), *timed(), *dependent()], arch, sm_count)
    found += around(arch, sm_count)
    for problem in tuned(arch, sm_count):
        for fields in candidates(problem):
            found += problem.kernels(fields)
    found += probes.kernels(arch)
    return list(dict.fromkeys(found))


def tested(arch: archs.Arch, sm_count: int, chosen: Sequence[str] = ()) -> list[plan.Kernel]:
    """Return the kernels that ``pytest --gpu`` runs on such a GPU.

    Tests run on one of gpushim, in a process of their own, without compiling anything: see `gpu_pass.pytest_kernels`.

    Parameters
    ----------
    chosen : sequence of str
        Paths of tests, by default those of `tests`.

    Raises
    ------
    RuntimeError
        They do not run.
    """
    folders = (".", "tools", "tools/ptxsim", "tools/gpumodel", "tools/gpushim", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(str(ROOT / folder) for folder in folders if folder)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "kernels.json"
        shim = ("-m", "gpushim", "--devices", f"{arch.name}:{sm_count}", "--folder", str(Path(scratch) / "gpushim"))
        pytest = ("-m", "pytest", "--gpu", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", SELECTED)
        command = [sys.executable, *shim, sys.executable, *pytest, "-p", "gpu_pass.pytest_kernels"]
        command += ["--kernels-out", str(out), *(chosen or tests())]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        found = plan.read(str(out), [arch]) if out.exists() else []
    if not found:  # a test that looks at its results may fail
        raise RuntimeError(f"the tests do not run on a GPU of gpushim:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the kernels as a file of specs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="file of specs to write")
    parser.add_argument("--arch", default="sm_90a", choices=tuple(archs.ARCHS), help="target (default: sm_90a)")
    parser.add_argument(
        "--sms", type=int, nargs="+", metavar="N",
        help="SMs of the GPU; of several, what any of them needs (default: those of the target's reference board)",
    )  # fmt: skip
    parser.add_argument("--tests", action="store_true", help="add the kernels of the tests; needs gpushim")
    options = parser.parse_args(argv)
    arch, found = archs.by_name(options.arch), dict[plan.Kernel, None]()
    for sm_count in options.sms or [arch.sm_count]:
        found |= dict.fromkeys(kernels(arch, sm_count))
        if options.tests:
            found |= dict.fromkeys(tested(arch, sm_count))
    entries = [plan.as_entry(*kernel) for kernel in found]
    options.out.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(entries)} kernels for {arch.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
