"""Load a kernel of a bundle with TVM-FFI alone: no torch, no compiler, not even cute_ssm.

    python tools/build_aot.py --specs SPECS.json --arch sm_90a --with-runtime --out BUNDLE
    python examples/without_torch.py BUNDLE

The bundle's manifest says what each kernel takes: names, types, sizes, strides, and what it writes. Any array with
`__dlpack__` will do. With CuPy on a GPU of the bundle's target, the kernel runs and its result is checked; without, it
is called with NumPy arrays, which it refuses: they are not on a GPU.

[without_torch.cpp](without_torch.cpp) does the same from C++.
"""

import argparse
import ctypes
import json
from pathlib import Path

import numpy

SIZES = {"state.0": 3, "state.1": 4, "x.0": 2, "B.1": 1}  # slots, heads, batch, groups; other sizes are the kernel's
SCALARS = {"pad_slot_id": -1, "max_tokens": 1, "max_ctas": 1}


def load(bundle, kernel):
    """Return a kernel of the manifest as a function."""
    import tvm_ffi

    runtime = next(Path(bundle).glob("libcute_dsl_runtime.so"), "libcute_dsl_runtime.so")
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # before the kernel, whose library looks for its functions
    return tvm_ffi.load_module(str(Path(bundle) / kernel["file"]))[kernel["symbol"]]


def random(np, argument, rng):
    """Return an array as the manifest describes it, by NumPy or CuPy; sizes with stride 0 share their elements."""
    shape = [SIZES.get(size, size) for size in argument["shape"]]
    stored = [1 if stride == 0 else size for size, stride in zip(shape, argument["strides"])]
    if argument["name"] == "state_batch_indices":
        array = np.asarray(numpy.arange(stored[0]), dtype=argument["dtype"])
    else:
        values = rng.standard_normal(stored)
        array = np.asarray(-numpy.abs(values) if argument["name"] == "A" else values, dtype=argument["dtype"])
    strides = [0 if size == 1 else step for size, step in zip(stored, array.strides)]
    return np.lib.stride_tricks.as_strided(array, shape, strides)


def expected(state, x, dt, A, B, C, D, dt_bias):
    """One step in NumPy: the output and the new states, float64; every request has the slot of its number."""
    dt = numpy.logaddexp(0, dt + dt_bias)[..., :1, None]
    new = numpy.exp(A * dt) * state + dt * x[..., None] * B[:, :, None, :]
    return (new * C[:, :, None, :]).sum(-1) + D * x, new


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    kernels = json.loads((bundle / "manifest.json").read_text())
    kernel = next(each for each in kernels if each["spec"]["type"] == "SelectiveStateUpdateSpec")
    function = load(bundle, kernel)
    for argument in kernel["arguments"]:
        print(f"{argument['name']:28} {argument['kind']:8} {argument.get('dtype', '')} {argument.get('shape', '')}")
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, or no GPU
        cupy = None
    np, rng = cupy or numpy, numpy.random.default_rng(0)
    arrays = {one["name"]: random(np, one, rng) for one in kernel["arguments"] if one["kind"] == "tensor"}
    before = {name: numpy.asarray(array.get() if cupy else array, dtype="float64") for name, array in arrays.items()}
    given = [arrays.get(one["name"], SCALARS.get(one["name"])) for one in kernel["arguments"]]
    if cupy is None:
        try:
            function(*given)
        except ValueError as error:
            print(f"refused: {str(error).rpartition(', ')[2]}")
        print(f"{kernel['symbol']} is loaded; it runs on a GPU, with CuPy's arrays")
        return
    function(*given)
    out, state = (numpy.asarray(arrays[name].get(), dtype="float64") for name in ("out", "state"))
    batch = SIZES["x.0"]
    named = {name: before[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")}
    want, new = expected(before["state"][:batch], **named)
    numpy.testing.assert_allclose(state[:batch], new, rtol=1e-2, atol=1e-2)
    numpy.testing.assert_allclose(out, want, rtol=2e-2, atol=2e-2)
    print(f"{kernel['symbol']} ran on a GPU: {batch} requests, results as NumPy's")


if __name__ == "__main__":
    main()
