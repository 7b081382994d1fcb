"""Count what one call of an operator costs, on the emulator: issue slots, bytes, shared-memory wavefronts, registers,
and what the machine code of its kernels is made of.

    python tools/count.py selective_state_update batch=8 nheads=16 dim=64 dstate=128 state_dtype=float16 --json

Keys are the shape names of the operator, ``state_dtype``, ``input_dtype``, ``arch`` and ``config.FIELD``; each
operator's module in ``cute_ssm/workloads`` lists its own with their defaults, and says what a *unit* is; arguments are
random.  ``issue_slots`` are warp instructions of the PTX; ``machine_slots`` are the least and the most of the machine
code that agree with them (see `ptxsim.slots`), or null if the two codes do not correspond.  The ``machine_code`` of a
kernel has each instruction once: ``issue_slots``, bytes of code and of the largest loop, loads from local memory and
stores to it, and the instructions of each loop over lanes.  ``floor_bytes`` are the bytes that the call must read once
and write once; ``dram_bytes`` the distinct 32-byte sectors read plus those written, summed over launches: what a cold
cache would move; ``l2_bytes`` all sectors moved, repeats included.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys

from cute_ssm import tuning, workloads
from cute_ssm.runtime.companions import require

ptxsim = require("ptxsim")
from ptxsim import sass, slots  # noqa: E402

OPERATORS = {op: functools.partial(workloads.build, op) for op in workloads.OPERATORS}


def count(op: str, keys: dict[str, str], arch: str = "sm_90a", machine_code: bool = True) -> dict:
    """Run one call of an operator in the emulator and return what it cost.

    Parameters
    ----------
    op : str
        Name of an operator in ``OPERATORS``.
    keys : dict of str to str
        Shapes and types of the call, and ``config.FIELD`` for overrides of its config.
    arch : str
        Compile target.
    machine_code : bool
        Whether to disassemble the kernels.

    Raises
    ------
    ValueError
        If the operator, or a key, does not exist.
    ptxsim.sass.DisassemblerError
        There is no ``nvdisasm``; the message says how to get it.
    """
    if op not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(OPERATORS)}, got {op!r}")
    parameters = workloads.parameters(op)
    config = {k.removeprefix("config."): int(v) for k, v in keys.items() if k.startswith("config.")}
    shapes = {k: v for k, v in keys.items() if not k.startswith("config.")}
    for key in shapes:
        if key not in parameters:
            raise ValueError(f"{key}: expected one of {', '.join(parameters)}, arch or config.FIELD")
    call = OPERATORS[op](shapes)
    with ptxsim.emulate(arch=arch, counters=True) as session, tuning.override(**config):
        call.run()
    counters = [launch.counters.as_dict() for launch in session.launches]

    def total(name: str) -> int:
        return sum(c[name] for c in counters)

    classes = {name for c in counters for name in c["instructions"]}
    instructions = {name: sum(c["instructions"].get(name, 0) for c in counters) for name in sorted(classes)}
    slots_of_ptx = instructions.pop("total")
    dram = total("dram_read_bytes") + total("dram_write_bytes")
    l2 = total("l2_read_bytes") + total("l2_write_bytes")
    names = sorted({name for c in counters for name in c["tensors"]})
    wavefronts, excess = total("smem_wavefronts"), total("smem_excess")
    codes = [sass.of_kernel(function) for function in session.functions] if machine_code else []
    machine = machine_slots(session) if machine_code else None
    per_unit = None if machine is None else [round(bound / call.units, 2) for bound in machine]
    return {
        "op": op,
        "arch": arch,
        "keys": {**parameters, **keys},
        "kernels": [
            {
                "name": kernel.name,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": max(
                    launch.smem_total for launch in session.launches if launch.program.kernel.name == kernel.name
                ),
                **({"machine_code": codes[number][kernel.name].facts()} if machine_code else {}),
            }
            for number, function in enumerate(session.functions)
            for kernel in function.kernels
        ],
        "launches": len(session.launches),
        "grids": [list(launch.grid) for launch in session.launches],
        "units": call.units,
        "issue_slots": slots_of_ptx,
        "issue_slots_per_unit": round(slots_of_ptx / call.units, 2),
        "instructions_per_unit": {name: round(n / call.units, 2) for name, n in instructions.items()},
        **({"machine_slots": machine, "machine_slots_per_unit": per_unit} if machine_code else {}),
        "floor_bytes": call.floor_bytes,
        "dram_bytes": dram,
        "l2_bytes": l2,
        "dram_over_floor": round(dram / call.floor_bytes, 4),
        "l2_over_floor": round(l2 / call.floor_bytes, 4),
        "smem_wavefronts": wavefronts,
        "smem_excess_fraction": round(excess / wavefronts, 4) if wavefronts else 0.0,
        "tensors": {
            name: {
                key: sum(c["tensors"][name][key] for c in counters if name in c["tensors"])
                for key in ("dram_read_bytes", "dram_write_bytes", "l2_read_bytes", "l2_write_bytes")
            }
            for name in names
        },
    }


def machine_slots(session: ptxsim.Session) -> list[int] | None:
    """Return the least and the most issue slots of the machine code of all launches; None if one is not known."""
    least = most = 0
    for launch in session.launches:
        name = launch.program.kernel.name
        function = next(f for f in session.functions if any(kernel.name == name for kernel in f.kernels))
        lines = sass.lines_of(sass.cubin_of(function))[name]
        found = slots.issued(launch, sass.of_kernel(function)[name], lines)
        if found is None:
            return None
        least, most = least + found.least, most + found.most
    return [least, most]


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=OPERATORS)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ptx-only", action="store_true", help="without machine code, which needs nvdisasm")
    options = parser.parse_args(argv)
    keys = dict(item.partition("=")[::2] for item in options.keys)
    arch = keys.pop("arch", "sm_90a")
    try:
        result = count(options.op, keys, arch, not options.ptx_only)
    except ValueError as error:
        parser.error(str(error))
    except sass.DisassemblerError as error:
        parser.error(f"{error}; or leave it out: --ptx-only")
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
