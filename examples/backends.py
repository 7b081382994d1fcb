"""The `--backend` option that the examples share.

`reference` runs the PyTorch reference on CPU tensors, `emulate` the compiled kernel on the same CPU tensors in the PTX
emulator, and `cuda` the compiled kernel on a GPU. An operator is called in the same way for all three.
"""

import argparse
import contextlib

import torch

BACKENDS = ("reference", "emulate", "cuda")


def parser(description, choices=BACKENDS):
    """Return an argument parser with `--backend`; the default is the GPU if there is one, else the reference."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "reference"
    made.add_argument("--backend", choices=choices, default=default, help="default on this machine: %(default)s")
    return made


@contextlib.contextmanager
def use(backend):
    """Run the block on a backend, and yield the device that its tensors belong on."""
    if backend == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--backend cuda needs a GPU; --backend emulate runs the same kernel on the CPU")
        yield torch.device("cuda")
    elif backend == "emulate":
        try:
            import ptxsim
        except ModuleNotFoundError:
            raise SystemExit("--backend emulate needs the emulator: pip install ./tools/ptxsim") from None

        with ptxsim.emulate(arch="sm_90a"):  # operators called inside run the kernel compiled for this target
            yield torch.device("cpu")
    else:
        yield torch.device("cpu")
