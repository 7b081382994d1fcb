"""`TokenIO`: how `SelectiveStep` reads the inputs of a token and writes its outputs."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric

from cute_ssm.device import convert, math, memory
from cute_ssm.device.state import StateView
from cute_ssm.ops.selective_state_update.config import input_vector
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.units import Tensors, Unit


class HeadScalars(NamedTuple):
    """What the rows of a head share for one token; None where it differs between rows or columns.

    Attributes
    ----------
    step : Float32 or None
        dt'.
    rate : Float32 or None
        A.
    decay : Float32 or None
        e^(A dt').
    """

    step: Optional[Float32]
    rate: Optional[Float32]
    decay: Optional[Float32]


class SkipTerm(NamedTuple):
    """The factors of the skip term of one output."""

    D: Float32
    x: Float32


class RowScalars(NamedTuple):
    """What one row of the state needs for one token.

    Attributes
    ----------
    decay : Float32
        e^(A dt'), or dt' where A differs between columns.
    gain : Float32
        dt' x.
    skip : SkipTerm or None
    """

    decay: Float32
    gain: Float32
    skip: Optional[SkipTerm]


class TokenIO:
    """Addresses, loads and stores of the tensors that have a row for each token, and of the weights."""

    def __init__(self, spec: SelectiveStateUpdateSpec, view: StateView) -> None:
        self.spec, self.view = spec, view
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.A_dtype = convert.DTYPES[spec.A_dtype]
        self.dt_dtype = convert.DTYPES[spec.dt_dtype]
        self.D_dtype = None if spec.D_dtype is None else convert.DTYPES[spec.D_dtype]
        self.dt_bias_dtype = None if spec.dt_bias_dtype is None else convert.DTYPES[spec.dt_bias_dtype]

    def input_vector(self, dtype: type[Numeric]) -> int:
        """Elements of one access to a row of B, C or A."""
        return input_vector(self.spec, dtype.width // 8) if self.spec.vector_inputs else 1

    def pointer(self, tensor: cute.Tensor, unit: Unit, token: Int32, *coord: Int32) -> cute.Pointer:
        """Pointer to an element of a token of the unit's sequence."""
        rows = {
            "one": (unit.sequence,),
            "batched": (unit.sequence, token),
            "packed": (unit.first_token + token,),
        }
        return memory.address(tensor, *rows[self.spec.tokens], *coord)

    # ---------------------------------------------------------------------------------------------------------- inputs
    def load_columns(self, pointer: cute.Pointer, lane: Int32) -> list[Float32]:
        """Load this lane's columns of a row of B, C or A."""
        dtype = pointer.dtype
        columns: list[Float32] = self.view.load_columns(pointer, lane, self.input_vector(dtype) * dtype.width // 8)
        return columns

    def load_step(self, tensors: Tensors, unit: Unit, token: Int32, row: Int32) -> Float32:
        """Load dt' of a row."""
        step = memory.load_scalar(self.pointer(tensors.dt, unit, token, unit.head, row), self.dt_dtype)
        if tensors.dt_bias is not None:
            step += memory.load_scalar(memory.address(tensors.dt_bias, unit.head, row), self.dt_bias_dtype)
        return math.softplus(step) if self.spec.dt_softplus else step

    def load_head(self, tensors: Tensors, unit: Unit, token: Int32) -> HeadScalars:
        """Load what the rows of the unit's head share for a token."""
        spec = self.spec
        step = self.load_step(tensors, unit, token, 0) if spec.dt_tied else None
        rate = memory.load_scalar(memory.address(tensors.A, unit.head, 0, 0), self.A_dtype) if spec.A_tied else None
        return HeadScalars(step, rate, None if step is None or rate is None else math.decay(rate * step))

    def load_row(self, head: HeadScalars, tensors: Tensors, unit: Unit, token: Int32, row: Int32) -> RowScalars:
        """Load what this lane's row needs for a token."""
        step, decay = head.step, head.decay
        if step is None:
            step = self.load_step(tensors, unit, token, row)
        if decay is None:
            decay = step if head.rate is None else math.decay(head.rate * step)
        x = memory.load_scalar(self.pointer(tensors.x, unit, token, unit.head, row), self.input_dtype)
        skip = self.load_skip(tensors, unit, row, x)
        return RowScalars(decay, step * x, skip)

    def load_skip(self, tensors: Tensors, unit: Unit, row: Int32, x: Float32) -> Optional[SkipTerm]:
        """Load the skip term of an output, if there is one."""
        if tensors.D is None:
            return None
        return SkipTerm(memory.load_scalar(memory.address(tensors.D, unit.head, row), self.D_dtype), x)

    def column_decays(
        self, tensors: Tensors, unit: Unit, decay: Float32, first_row: Int32, step: int, lane: Int32
    ) -> list[Float32]:
        """Decays of this lane's columns of its row at a step of the block from `first_row` on.

        `decay` is that of `RowScalars` of the lane's own row.
        """
        rate = decay if self.spec.decay_tied else math.exchanged(decay, step)
        if self.spec.A_tied:
            return [rate] * self.view.columns
        row = first_row + self.view.row_of(lane, step)
        return [math.decay(a * rate) for a in self.load_columns(memory.address(tensors.A, unit.head, row, 0), lane)]

    # --------------------------------------------------------------------------------------------------------- outputs
    def store_output(
        self, tensors: Tensors, unit: Unit, token: Int32, row: Int32, value: Float32, skip: Optional[SkipTerm]
    ) -> None:
        """Add the skip term, gate, round and store one output.

        The sum is an explicit fma: whether the compiler contracts it depends on the code around it.
        """
        if skip is not None:
            value = cute.math.fma(skip.D, skip.x, value)
        if tensors.z is not None:
            z = memory.load_scalar(self.pointer(tensors.z, unit, token, unit.head, row), self.input_dtype)
            value *= math.silu(z)
        memory.store_scalar(self.pointer(tensors.out, unit, token, unit.head, row), value, self.input_dtype)
