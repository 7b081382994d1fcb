"""`TokenGates`: decay and step of each token."""

import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric, const_expr

from cute_ssm.device import convert, math, memory
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.ops.gated_delta_rule_mtp.tensors import Tensors


class TokenGates:
    """Gates from logits, or given as they are."""

    def __init__(self, spec: GatedDeltaRuleSpec) -> None:
        self.logits = spec.gate_logits
        self.dtype: type[Numeric] = convert.DTYPES[spec.gate_dtype]
        self.dt_bias_dtype: type[Numeric] = convert.DTYPES[spec.dt_bias_dtype]

    @cute.jit
    def load(self, tensors: Tensors, unit: Unit, count: Int32, lane: Int32) -> tuple[Float32, Float32]:
        """Return decay and step of the lane's token; 1 and 0 past the last token."""
        i, h = unit.request, unit.head
        alpha, beta = Float32(1.0), Float32(0.0)
        if lane < count:
            x = memory.load_scalar(memory.address(tensors.a, i, lane, h), self.dtype)
            beta = memory.load_scalar(memory.address(tensors.b, i, lane, h), self.dtype)
            if const_expr(self.logits):
                x += memory.load_scalar(memory.address(tensors.dt_bias, h), self.dt_bias_dtype)
                A_log = memory.load_scalar(memory.address(tensors.A_log, h), Float32)
                alpha = math.gate_decay(A_log, x)
                beta = math.sigmoid(beta)
            else:
                alpha = math.exponential(x)
        return alpha, beta
