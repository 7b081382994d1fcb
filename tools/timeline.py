"""Draw what every warp of a CTA waits for, and how many bytes of state are on their way; modelled.

    python tools/timeline.py selective_state_update batch=128 nheads=16 --machine H200 --png timeline.png
    python tools/timeline.py gated_delta_rule_mtp B=32 T=4 config.rows=64 --cta 2

Keys are those of tools/count.py.  The clocks are those of `gpumodel`, modelled and not
measured: the picture shows the order of events and what overlaps, not times.  A call that is larger than the model
replays is drawn with as many requests as it does replay, and the config of the large one.

Warps have the names that their kernel class gives them: ``ROLES``, a tuple of one name per warp, of which the last is
that of all further warps; or a function ``roles(spec, config)`` that returns such a tuple.
"""

from __future__ import annotations

import argparse
import json
import sys

from cute_ssm import arch, runtime, tuning, workloads
from cute_ssm.runtime import registry
from cute_ssm.runtime.companions import require
from cute_ssm.tuner import modelled

gpumodel = require("gpumodel")
from gpumodel import timeline  # noqa: E402


def is_state(tensor: str) -> bool:
    """Whether a tensor holds states."""
    return "state" in tensor and not any(part in tensor for part in ("ind", "scale", "batch", "has_initial"))


STATE = timeline.Watched("state", is_state)


def lives(op: str, keys: dict[str, str], gpu: str = "H200", cta: int | None = None) -> list[timeline.Life]:
    """The life of one CTA of every launch of a call.

    Parameters
    ----------
    op, keys
        As for tools/count.py, with ``config.FIELD``.
    gpu : str
        A name of ``gpumodel.MACHINES``, or a target.
    cta : int, optional
        Number of the CTA among those of the SM; default: one that starts when the SM is full, if there is one.
    """
    machine = gpumodel.machine_of(gpu)
    config = {k.removeprefix("config."): int(v) for k, v in keys.items() if k.startswith("config.")}
    shapes = {k: v for k, v in keys.items() if not k.startswith("config.")}
    call, fields = modelled.replayed(op, shapes, machine, config)
    kernels = modelled.time_call(call, machine, fields, timeline=True).kernels
    roles = roles_of(call, machine, fields) or [None]
    return [timeline.life_of(kernel, cta, roles[min(i, len(roles) - 1)], STATE) for i, kernel in enumerate(kernels)]


def roles_of(call: workloads.Call, machine: gpumodel.Machine, fields: dict[str, int]) -> list[tuple[str, ...] | None]:
    """Names of the warps of each kernel of a call, None where its class gives none."""
    with runtime.planned(arch.by_name(machine.arch), machine.sms) as plan, tuning.override(**fields):
        call.run()
    named = []
    for spec, config, _ in plan.kernels:
        kernel = registry.kernel_class(spec)
        named.append(kernel.roles(spec, config) if hasattr(kernel, "roles") else getattr(kernel, "ROLES", None))
    return named


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, replay, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=workloads.OPERATORS)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--machine", default="H200", choices=gpumodel.MACHINES)
    parser.add_argument("--cta", type=int, help="number of the CTA among those of the SM")
    parser.add_argument("--png", metavar="FILE", help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per launch instead of text")
    parser.add_argument("--width", type=int, default=100, help="columns of the text")
    options = parser.parse_args(argv)
    keys = dict(item.partition("=")[::2] for item in options.keys)
    try:
        found = lives(options.op, keys, options.machine, options.cta)
    except ValueError as error:
        parser.error(str(error))
    said = " ".join([options.op, *options.keys])
    title = f"{said} on {options.machine}: modelled, constants not fitted"
    if options.json:
        for life in found:
            print(json.dumps(life.as_dict()))
    else:
        print(title)
        for life in found:
            print("\n" + timeline.text(life, options.width))
    if options.png:
        timeline.picture(found, options.png, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
