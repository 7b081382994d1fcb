"""The spec of `cute_ssm.serving.materialize_layers`."""

from __future__ import annotations

from dataclasses import dataclass

from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.spec import Spec


@dataclass(frozen=True)
class MaterializeLayersSpec(Spec):
    """A call of `cute_ssm.serving.materialize_layers`.

    Attributes
    ----------
    state_dtype, input_dtype, A_dtype : str
        Types of the states, of the rings of x and B, and of ``A``.
    dim, dstate : int
        Rows and columns of one head's state.
    philox_rounds : int
        0: states are rounded to nearest even; otherwise stochastically, by this many rounds.
    """

    state_dtype: str
    input_dtype: str
    A_dtype: str
    dim: int
    dstate: int
    philox_rounds: int = 0

    @property
    def op(self) -> str:
        return "serving_materialize_layers"

    @property
    def of_layer(self) -> MaterializeSpec:
        """What each layer is: a call of `cute_ssm.serving.materialize`."""
        return MaterializeSpec(
            state_dtype=self.state_dtype,
            out_dtype=self.state_dtype,
            input_dtype=self.input_dtype,
            A_dtype=self.A_dtype,
            dim=self.dim,
            dstate=self.dstate,
            history="ring",
            src_dtype="int32",
            dst_dtype="int32",
            count_dtype="int32",
            philox_rounds=self.philox_rounds,
        )

    def text(self) -> str:
        return f"{self.op}-{self.state_dtype}-{self.dim}x{self.dstate}"

    def check(self) -> None:
        self.of_layer.check()
