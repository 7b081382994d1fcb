"""Arrays of other libraries as arguments of operators: views of the same memory, by DLPack."""

from __future__ import annotations

import materialize_gated_cases
import numpy as np
import pytest
import torch
from bits import equal, same_bits, same_memory, stored
from index_calls import CALLS
from memory import copy

import cute_ssm
from cute_ssm import serving
from cute_ssm.ops._arguments import WRITTEN
from cute_ssm.ops._dlpack import view

NUMPY_TYPES = {torch.float32, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


class Array:
    """An array with nothing but DLPack, as another library's."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class OldArray(Array):
    """One of a library that is older than DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.tensor.__dlpack__(stream=stream)


class ImmutableArray(Array):
    """One of a library whose arrays nothing may change, and whose capsules do not say so."""


ImmutableArray.__module__ = "jaxlib._jax"


CALLED = {name: (operator, make) for name, (operator, make, _) in CALLS.items() if "pool" not in name}
CALLED["materialize, gated delta"] = (
    serving.materialize_gated_delta,
    lambda: materialize_gated_cases.arguments(materialize_gated_cases.Case(to="f32")),
)
each_call = pytest.mark.parametrize("call", CALLED)


def tensors_of(arguments: dict[str, object]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def returned_by(operator, arguments: dict[str, object]) -> list[torch.Tensor]:
    found = operator(**arguments)
    return [value for value in (found if isinstance(found, tuple) else (found,)) if value is not None]


def changed_by(operator, arguments: dict[str, object]) -> set[str]:
    before = copy(arguments)
    operator(**arguments)
    return {
        name for name, tensor in tensors_of(arguments).items() if not torch.equal(stored(tensor), stored(before[name]))
    }


@pytest.mark.parametrize("kind", [Array, OldArray])
@each_call
def test_each_argument_may_be_an_array(call, kind):
    operator, make = CALLED[call]
    want = make()
    first = copy(want)
    returned = returned_by(operator, want)
    for name in tensors_of(want):
        tensors = copy(first)
        found = returned_by(operator, {**tensors, name: kind(tensors[name])})
        assert all(type(value) is torch.Tensor for value in found)
        for got, expected in zip(found, returned, strict=True):
            same_bits(got, expected, f"{name}: returned")
        for other, tensor in tensors_of(tensors).items():
            same_bits(tensor, want[other], f"{name}: {other}")


@each_call
def test_all_arguments_may_be_arrays_of_numpy(call):
    operator, make = CALLED[call]
    want = make()
    tensors = copy(want)
    operator(**want)
    arrays = {name: tensor.numpy() for name, tensor in tensors_of(tensors).items() if tensor.dtype in NUMPY_TYPES}
    assert arrays
    operator(**{**tensors, **arrays})
    for name, tensor in tensors_of(tensors).items():
        same_bits(tensor, want[name], name)


@each_call
def test_arrays_that_may_not_change_are_read_and_not_written(call):
    operator, make = CALLED[call]
    first = make()
    changed = changed_by(operator, copy(first))
    assert changed or call.startswith("work items")
    for name, tensor in tensors_of(first).items():
        tensors = copy(first)
        arrays = [ImmutableArray(tensors[name])]
        if tensor.dtype in NUMPY_TYPES:
            arrays.append(tensors[name].numpy())
            arrays[-1].flags.writeable = False
        for array in arrays:
            if name not in WRITTEN:
                assert name not in changed
                operator(**{**copy(first), name: array})
            elif name in changed:
                with pytest.raises(ValueError, match=f"^{name}: expected writable memory, as it is written, got a"):
                    operator(**{**tensors, name: array})
                for other, value in tensors_of(tensors).items():
                    same_memory(value, first[other], other)


@each_call
def test_what_is_no_array_is_named_though_others_are_arrays(call):
    operator, make = CALLED[call]
    arguments = make()
    for name in tensors_of(arguments):
        others = {other: Array(tensor) for other, tensor in tensors_of(arguments).items() if other != name}
        with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, or an array with __dlpack__, got list"):
            operator(**{**arguments, **others, name: [1.0]})


def test_a_view_shares_memory_and_strides():
    tensor = torch.arange(24.0).reshape(4, 6)[:, ::2]
    step = {"state": torch.zeros(1, 1, 4, 3), "A": torch.zeros(1, 1, 1).expand(1, 4, 3)}
    for array in (tensor.numpy(), Array(tensor), step["A"].numpy()):
        found = view("x", array)
        want = torch.from_numpy(array) if isinstance(array, np.ndarray) else tensor
        assert (found.data_ptr(), found.stride(), found.shape) == (want.data_ptr(), want.stride(), want.shape)


def test_an_array_that_cannot_be_exported_is_named_with_the_reason():
    operator, make = CALLED["step"]
    call = make()
    x = np.zeros(tuple(call["x"].shape), dtype="datetime64[s]")
    with pytest.raises(
        TypeError, match=r"^x: expected an array that can be exported by DLPack, got ndarray of datetime64"
    ):
        operator(**{**call, "x": x})


@pytest.mark.parametrize("shape", ["heads", "one head", "steps", "one step"])
def test_axes_that_may_be_left_out_may_be_left_out_of_arrays(shape):
    """An argument that is found to be an array after others have got or lost an axis."""
    heads, dim, dstate = (1 if shape == "one head" else 2), 8, 16
    tokens = {"steps": (2, 3), "one step": (2, 1)}.get(shape, (2,))
    x = torch.randn(*tokens, heads, dim)
    B = torch.randn(*tokens, 1, dstate)
    arguments = {
        "state": torch.randn(2, heads, dim, dstate), "x": x, "dt": torch.rand(*tokens, heads, 1).expand(x.shape),
        "A": -torch.rand(heads, 1, 1).expand(heads, dim, dstate), "B": B, "C": torch.randn_like(B),
        "D": torch.rand(heads, 1).expand(heads, dim), "z": torch.randn_like(x),
    }  # fmt: skip
    if shape == "one head":
        axes = {"state": 1, "x": 1, "dt": 1, "A": 0, "B": 1, "C": 1, "D": 0, "z": 1}
        arguments = {name: tensor.squeeze(axes[name]) for name, tensor in arguments.items()}
    if shape == "steps":
        arguments["intermediate_states_buffer"] = torch.zeros(2, 3, heads, dim, dstate)
        arguments["cache_steps"] = 3
    fresh = {name: value.clone() if name == "state" else value for name, value in arguments.items()}
    want = cute_ssm.selective_state_update(**fresh)
    for name in ("dt", "C", "D", "z"):
        changed = {**arguments, "state": arguments["state"].clone(), name: Array(arguments[name])}
        equal(cute_ssm.selective_state_update(**changed), want, name)
        equal(changed["state"], fresh["state"], name)
