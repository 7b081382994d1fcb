"""`Unit`: what one CTA of the gated delta rule works on."""

from typing import NamedTuple

from cutlass import Int32, Int64


class Unit(NamedTuple):
    """Rows of one head's state.

    Attributes
    ----------
    request : Int32
        Row of the batch.
    head, key_head : Int32
        Value head, and the head of q and k that it uses.
    head_in_group : Int32
        Number of the value head among those of its key head.
    first_row : Int32
        First row of the state.
    slot : Int64
        Slot of the state that is read; 64 bits, because its product with the slot's stride passes 2^31 elements.
    """

    request: Int32
    head: Int32
    key_head: Int32
    head_in_group: Int32
    first_row: Int32
    slot: Int64
