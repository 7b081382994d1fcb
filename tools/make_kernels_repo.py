"""Lay the package out as a repository of the Hugging Face package `kernels` (0.17), which loads it without installing.

    python tools/make_kernels_repo.py OUT
    python -c "from kernels import get_local_kernel; print(get_local_kernel('OUT').selective_state_update)"

OUT is a new folder, to be loaded by ``get_local_kernel``, or uploaded and then loaded by ``get_kernel``::

    README.md, LICENSE, NOTICE
    build/torch-universal/metadata.json     what `kernels` reads: name, version, dependencies, GPUs
    build/torch-universal/__init__.py       the operators, as attributes
    build/torch-universal/cute_ssm/         the package

Kernels are compiled at their first call, for which ``nvidia-cutlass-dsl`` must be installed, or loaded from a bundle;
see docs/guides/ahead-of-time.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cute_ssm
from cute_ssm.arch import ARCHS

ROOT = Path(__file__).parents[1]
VARIANT = Path("build", "torch-universal")  # Python alone, for every version of PyTorch
SOURCE = "https://github.com/cute-ssm/cute_ssm"

CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, mamba, state-space-models, gated-delta-net]
---

# cute-ssm

State-space-model decode kernels in NVIDIA's CuTe DSL: the operators of [cute_ssm]({source}) {version}.

```python
from kernels import get_kernel

ssm = get_kernel("OWNER/cute-ssm", version={number})
ssm.selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, out=out)
```

Attributes are {operators}, and the modules `compat`, `integrations` and `serving` of the package.

GPUs: {gpus}. Kernels are compiled when they are first called, which takes seconds and needs `pip install
nvidia-cutlass-dsl cuda-python`. Tensors on the CPU run a reference in PyTorch.

A process loads one version: the folder's package `cute_ssm` is imported by that name. If another version has been
imported before, loading raises an ImportError.
"""

LOADER = '''"""The operators of cute_ssm {version}, as a repository of `kernels`."""

import importlib
import sys
from pathlib import Path

VERSION = "{version}"
MODULES = ("compat", "integrations", "serving")
FOLDER = str(Path(__file__).resolve().parent)

if "cute_ssm" not in sys.modules:
    sys.path.insert(0, FOLDER)  # stays: processes that compile import the package by its name
_package = importlib.import_module("cute_ssm")
if _package.__version__ != VERSION:
    raise ImportError(
        f"cute_ssm: expected version {{VERSION}}, got {{_package.__version__}}, which this process has imported from "
        f"{{_package.__file__}}; load the repository in a process that has not"
    )
__all__ = [*_package._PUBLIC, *MODULES]


def __getattr__(name):
    if name in MODULES:
        return importlib.import_module(f"cute_ssm.{{name}}")
    if name in _package._PUBLIC:
        return getattr(_package, name)
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


def __dir__():
    return sorted(__all__)
'''


def main(argv: list[str] | None = None) -> int:
    """Write the repository."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--version", type=int, default=1, help="of the repository, for get_kernel (default: 1)")
    options = parser.parse_args(argv)
    if options.out.exists():
        print(f"{parser.prog}: out: expected a folder that does not exist, got {options.out}", file=sys.stderr)
        return 2
    write(options.out, options.version)
    print(f"{options.out}: {sum(path.is_file() for path in options.out.rglob('*'))} files")
    return 0


def write(out: Path, number: int) -> None:
    """Write the repository, version `number`, into a new folder."""
    variant = out / VARIANT
    package = Path(cute_ssm.__file__).parent
    for file in files(package):
        target = variant / "cute_ssm" / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    text = {"version": cute_ssm.__version__, "number": number, "source": SOURCE}
    (variant / "__init__.py").write_text(LOADER.format(**text))
    (variant / "metadata.json").write_text(json.dumps(metadata(variant, number), indent=2) + "\n")
    operators = ", ".join(f"`{name}`" for name in cute_ssm._PUBLIC)
    (out / "README.md").write_text(CARD.format(**text, operators=operators, gpus=", ".join(ARCHS)))
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, out / name)


def files(package: Path) -> Iterator[Path]:
    """List the files of the package, without what Python and the compiler leave beside them."""
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def metadata(variant: Path, number: int) -> dict[str, object]:
    """Return what `kernels` reads of a variant.

    Its id is the name of the imported module, which must differ between versions.
    """
    digest = hashlib.sha256()
    for file in files(variant):
        digest.update(file.relative_to(variant).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "id": f"_cute_ssm_{number}_{digest.hexdigest()[:12]}",
        "name": "cute-ssm",
        "version": number,
        "license": "Apache-2.0",
        "upstream": SOURCE,
        "source": SOURCE,
        "kernels-minver": "0.17.0",
        # nvidia-cutlass-dsl, a dependency that kernels knows for builds with CUDA alone, is not needed on the CPU
        "python-depends": ["tvm-ffi"],
        "backend": {"type": "cuda", "archs": ["{}.{}a".format(*arch.capability) for arch in ARCHS.values()]},
    }


if __name__ == "__main__":
    sys.exit(main())
