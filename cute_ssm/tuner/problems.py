"""A problem: one call on one target, the question it asks the tables, and the configs that may answer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cute_ssm import runtime, tuning, workloads
from cute_ssm.arch import Arch
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.spec import Config, digest
from cute_ssm.tuning import tables
from cute_ssm.tuning.tables import Lookup
from cute_ssm.workloads.plan import Kernel

Fields = dict[str, "int | str"]


@dataclass(frozen=True)
class Case:
    """A call and its target, as it is sent to workers and written to journals."""

    op: str
    keys: tuple[tuple[str, int | str], ...]
    arch: str

    def text(self) -> str:
        """The operator and its parameters, as on the command line."""
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.keys)])

    def digest(self) -> str:
        """Return a stable ID of twelve hexadecimal digits."""
        return digest(self)


@dataclass(frozen=True)
class Problem:
    """What to search for a case.

    Attributes
    ----------
    case : Case
    lookup : Lookup
        What the call asks the tables.
    space : dict
        Values of each field; those of the rule among them.
    """

    case: Case
    lookup: Lookup
    arch: Arch
    space: dict[str, tuple[int | str, ...]]
    sm_count: int | None = None

    def rule(self) -> Fields:
        """The fields that the rule chose."""
        return {name: getattr(self.lookup.rule, name) for name in self.space}

    def config(self, fields: Mapping[str, int | str]) -> Config:
        """The config with these fields."""
        return dataclasses.replace(self.lookup.rule, **fields)

    def valid(self, fields: Mapping[str, int | str]) -> bool:
        """Whether the kernel can run so, the GPU can hold it, and fields that mean nothing are those of the rule."""
        config = self.config(fields)
        try:
            config.check(self.lookup.spec, self.arch)
        except UnsupportedSpecError:
            return False
        if config != self.lookup.rule and not config.fits(self.lookup.spec, self.arch):
            return False
        return all(getattr(config, name) == getattr(self.lookup.rule, name) for name in config.inert())

    def kernels(self, fields: Mapping[str, int | str]) -> list[Kernel]:
        """What is compiled to run the call with these fields."""
        call = workloads.build(self.case.op, dict(self.case.keys), fill=False)
        with runtime.planned(self.arch, self.sm_count) as plan, tuning.override(**fields):
            call.run()
        return plan.kernels

    def row(self, fields: Fields, evidence: dict[str, Any]) -> tables.Row:
        """The row of a table that gives the call these fields."""
        spec = self.lookup.spec
        key = self.lookup.rule.KEY or tuple(field.name for field in dataclasses.fields(spec))
        return {
            "op": spec.op,
            "arch": self.arch.name,
            "heads": self.lookup.heads,
            "spec": {name: getattr(spec, name) for name in key},
            "config": fields,
            tables.EVIDENCE: evidence,
        }


def problem(op: str, keys: Mapping[str, int | str], arch: Arch, sm_count: int | None = None) -> Problem:
    """Return the problem of one call.

    Raises
    ------
    ValueError
        If the call asks the tables nothing, or for two configs, or if its configs have no space.
    """
    call = workloads.build(op, keys, fill=False)
    with tables.watching() as asked, runtime.planned(arch, sm_count):
        call.run()
    lookups = list(dict.fromkeys(asked))
    if len(lookups) != 1:
        expected = "an operator that asks tuning.tables.tuned once per call"
        raise ValueError(describe("op", expected, f"{op}, which asks {len(lookups)} times"))
    (lookup,) = lookups
    rule = type(lookup.rule)
    if not rule.FREE:
        expected = "an operator whose config has fields that change no result"
        raise ValueError(describe("op", expected, f"{op}, whose {rule.__name__} has none"))
    space = {}
    for name, values in rule.space(lookup.spec, arch).items():
        own = getattr(lookup.rule, name)
        space[name] = tuple(values) if own in values else (*values, own)
    unknown = set(space) - set(lookup.free)
    if unknown:
        raise ValueError(f"{rule.__name__}.space: expected fields of FREE, got {', '.join(sorted(unknown))}")
    case = Case(op, tuple(sorted(keys.items())), arch.name)
    return Problem(case, lookup, arch, space, sm_count)
