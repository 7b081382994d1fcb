"""What messages advise: a written argument is to be allocated, never copied; shapes that lack expanded dimensions."""

from __future__ import annotations

import re
import warnings

import pytest
import token_cases
import torch
from bits import equal
from index_calls import CALLS

import cute_ssm
from cute_ssm import runtime
from cute_ssm.arch import by_name
from cute_ssm.ops.selective_state_update import arguments as _step_arguments

WRITTEN = {
    "step": ("state", "out"),
    "step, saved": ("intermediate_states_buffer", "state", "out"),
    "checkpointing": ("state", "out", "old_x", "old_B", "old_dt", "old_cumAdt"),
    "checkpointing, list": ("state", "out", "x_cache", "B_cache", "dt_cache"),
    "gated delta": ("output", "initial_state"),
    "replay": ("initial_state", "output", "k_cache", "v_cache", "g_cache", "beta_cache"),
    "scan": ("ssm_states", "out"),
    "commit": ("prev_num_accepted_tokens", "cache_buf_idx"),
    "work items": ("work_items", "num_writes"),
    "materialize": ("out", "x_history", "B_history", "dt_history"),
}
COPIES = re.compile(r"\.contiguous\(|\.to\(|\.clone\(|cast it|clone it|copy")


def every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def no_room(t):
    return t[:1].expand(t.shape)


BREAKS = {
    "strides": every_other,
    "shared memory": no_room,
    "dtype": lambda t: t.to(torch.complex64),
    "shape": lambda t: t.repeat(*[1] * (t.dim() - 1), 3),
    "device": lambda t: t.to("meta"),
    "alignment": lambda t: torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape),
}


def given(call, name):
    arguments = CALLS[call][1]()
    if call == "materialize":
        arguments["out"] = torch.zeros_like(arguments["state"])
    if name not in arguments:  # results that are allocated if they are not given
        arguments[name] = torch.zeros_like(arguments["x" if "x" in arguments else "u" if "u" in arguments else "v"])
    return arguments


@pytest.mark.parametrize("change", BREAKS)
@pytest.mark.parametrize(("call", "name"), [(c, n) for c, names in WRITTEN.items() for n in names], ids=str)
def test_what_is_written_is_to_be_allocated(call, name, change):
    """Some of the layouts are legal for some arguments; all that is refused comes with an allocation, and no copy."""
    arguments = given(call, name)
    arguments[name] = BREAKS[change](arguments[name])
    try:
        CALLS[call][0](**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert not COPIES.search(message), message
        if message.startswith(f"{name}:") and change != "shape":  # of a shape other arguments may tell more
            assert "allocate it as torch.zeros(" in message, message
    else:
        assert change in ("strides", "shared memory", "alignment")


@pytest.mark.parametrize("name", ["delta", "z"])
def test_a_scan_in_place_does_not_advise_to_cast_what_it_writes(name):
    arguments = CALLS["scan"][1]()
    arguments[name] = arguments[name].double()
    with pytest.raises(TypeError, match=f"^{name}: .*so allocate it as torch.zeros") as caught:
        cute_ssm.selective_scan_fn(**{n: v for n, v in arguments.items() if n != "out"})
    assert not COPIES.search(str(caught.value))


SLICES = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}


@pytest.mark.parametrize("call", ["step", "step, matrices", "checkpointing", "checkpointing, list"])
@pytest.mark.parametrize("name", SLICES)
def test_the_advice_for_a_shape_without_expanded_dimensions_works(name, call):
    operator, make, _ = CALLS[call]
    arguments = make()
    whole = arguments[name]
    flat = arguments[name] = whole[(..., *[0] * SLICES[name])].clone()
    with pytest.raises(ValueError, match=rf"^{name}: expected shape .*; pass {name}\[\.\.\., None") as caught:
        operator(**arguments)
    advice = str(caught.value).rpartition("; pass ")[2]
    arguments[name] = eval(advice, {name: flat})
    equal(arguments[name].nan_to_num(), whole.nan_to_num())  # of padding
    assert arguments[name].stride()[-SLICES[name] :] == (0,) * SLICES[name]
    operator(**arguments)


def test_a_flat_x_is_named_in_its_own_shape():
    arguments = token_cases.arguments(token_cases.Tokens(packed=True, lengths=(2, 1)))
    arguments["x"] = arguments["x"].flatten(1)
    shape = tuple(arguments["x"].shape)
    with pytest.raises(ValueError, match=rf"^x: .*got {re.escape(str(shape))}; pass x.unflatten\(-1, \(2, 64\)\)"):
        cute_ssm.selective_state_update(**arguments)


def warned(arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cute_ssm.selective_state_update(**arguments)
    return [w for w in caught if str(w.message).startswith("A: ")]


def test_A_that_is_tied_in_value_alone_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(_step_arguments, "_warned", set())
    make = CALLS["step"][1]
    assert not warned(make())
    dense = make()
    dense["A"] = torch.rand(dense["A"].shape).neg()
    assert not warned(dense)  # values that differ
    one = make() | {"A": make()["A"].contiguous()}
    (warning,) = warned(one)
    assert "pass A[..., :1, :1].expand(A.shape)" in str(warning.message)
    assert warning.filename == __file__
    assert not warned(make() | {"A": make()["A"].contiguous()})


def test_values_of_A_are_not_read_on_a_gpu(monkeypatch):
    """There, its layout beside one step size per head is enough."""
    monkeypatch.setattr(_step_arguments, "_warned", set())

    class OnGPU:
        is_cuda, dtype, device, shape = True, torch.float32, torch.device("cuda"), (2, 64, 64)

        def stride(self):
            return (4096, 64, 1)

        def numel(self):
            return 2**13

    arguments = CALLS["step"][1]()
    with runtime.planned(by_name("sm_90a")) as plan:
        cute_ssm.selective_state_update(**arguments | {"A": torch.rand(arguments["A"].shape).neg()})
    spec = plan.kernels[0][0]
    with pytest.warns(UserWarning, match="twice the instructions"):
        _step_arguments.warn_of_dense_A(spec, OnGPU())
