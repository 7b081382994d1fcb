"""Inline PTX without side effects, which the compiler may schedule, merge and remove like any other value."""

from collections.abc import Sequence
from typing import Any

from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T


def _operands(args: Sequence[Any], loc: Any, ip: Any) -> list[ir.Value]:
    return [arg.ir_value(loc=loc, ip=ip) if hasattr(arg, "ir_value") else arg for arg in args]


def pure(result: ir.Type, args: Sequence[Any], text: str, constraints: str, loc: Any, ip: Any) -> ir.Value:
    """Emit ``text`` without side effects and return its result, of the MLIR type ``result``."""
    return llvm.inline_asm(
        result,
        _operands(args, loc, ip),
        text,
        constraints,
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def pure_floats(count: int, args: Sequence[Any], text: str, operands: str, loc: Any, ip: Any) -> list[ir.Value]:
    """Emit ``text`` and return its `count` float32 results.

    ``operands`` has one constraint letter for each of `args`.  Results are early clobbers, because ``text`` may write
    one before it has read all operands.
    """
    constraints = ",".join(["=&f"] * count + list(operands))
    results = pure(llvm.StructType.get_literal([T.f32()] * count), args, text, constraints, loc, ip)
    return [llvm.extractvalue(T.f32(), results, [i], loc=loc, ip=ip) for i in range(count)]
