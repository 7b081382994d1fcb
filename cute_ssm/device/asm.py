"""How one PTX instruction is emitted as a pure value: free to be scheduled, merged and removed."""

from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T


def _operands(args, loc, ip):
    return [arg.ir_value(loc=loc, ip=ip) if hasattr(arg, "ir_value") else arg for arg in args]


def pure(result, args, text, constraints, loc, ip):
    """Emit ``text`` without side effects and return its result of MLIR type ``result``."""
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


def pure_floats(count, args, text, operands, loc, ip):
    """Emit ``text`` with `count` float results, written before all of its `operands` (constraint letters) are read."""
    constraints = ",".join(["=&f"] * count + list(operands))
    results = pure(llvm.StructType.get_literal([T.f32()] * count), args, text, constraints, loc, ip)
    return [llvm.extractvalue(T.f32(), results, [i], loc=loc, ip=ip) for i in range(count)]
