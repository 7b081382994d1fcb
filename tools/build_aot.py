"""Compile kernels ahead of time into a bundle that loads without the compiler: a folder, or a wheel.

    python tools/build_aot.py --specs nemotron-3-super --arch sm_90a --out bundle
    CUTE_SSM_AOT_DIR=bundle python serve.py

Kernels that this tool-chain has built into the folder before are left as they are.

The kernels are those that ``python -m cute_ssm warmup`` would compile from the same options.  A wheel, called
``cute-ssm-aot``, is found without a variable once it is installed beside the same version of cute_ssm.  Building needs
a C compiler to link with.  Loading needs apache-tvm-ffi and libcute_dsl_runtime.so: that of an installed distribution
nvidia-cutlass-dsl-libs-cu12 (or -cu13) of the version that compiled, or, by ``--with-runtime``, a copy in the bundle;
NVIDIA's licence says where such a copy may go.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import json
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm.errors import CuteSsmError
from cute_ssm.runtime import bundles, interface, shelves, toolchain
from cute_ssm.runtime.store import Key
from cute_ssm.workloads import cli, plan

METADATA = """Metadata-Version: 2.1
Name: cute-ssm-aot
Version: {version}
Summary: Kernels of cute-ssm {version}, compiled ahead of time
License: Apache-2.0
Requires-Dist: cute-ssm=={version}
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: cute_ssm {version}\nRoot-Is-Purelib: false\nTag: {tag}\n"
INIT = '"""Kernels of cute_ssm, compiled ahead of time; `cute_ssm.runtime.bundles` finds them."""\n'


def main(argv: list[str] | None = None) -> int:
    """Compile, link, and pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_arguments(parser, targets="all")
    parser.add_argument("--out", required=True, type=Path, help="folder of the bundle, or of the wheel")
    parser.add_argument(
        "--register", action="append", default=[], metavar="MODULE:FUNCTION",
        help="call this first: it registers kernel classes of other packages; repeatable",
    )  # fmt: skip
    parser.add_argument("--wheel", action="store_true", help="make a wheel of the bundle")
    parser.add_argument("--with-runtime", action="store_true", help=f"copy {bundles.RUNTIME} into the bundle")
    options = parser.parse_args(argv)
    targets = [archs.by_name(name) for name in dict.fromkeys(options.arch or archs.ARCHS)]
    bundle = options.out / "bundle" if options.wheel else options.out
    for name in options.register:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)()
    try:
        code = cli.build(options, targets, bundle.absolute())
        finish(bundle, options.with_runtime)
        if options.wheel and not code:
            print(write_wheel(bundle, options.out))
    except (CuteSsmError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return code


def finish(bundle: Path, with_runtime: bool) -> None:
    """Remove what only building needed, and copy the runtime library if asked for.

    Raises
    ------
    CuteSsmError
        If there is no runtime library to copy.
    """
    for lock in bundle.rglob("*.lock"):
        lock.unlink()
    if with_runtime:
        library = bundles.runtime_library(bundle, toolchain.description())
        if library is None:
            raise CuteSsmError(f"no installed distribution of the compiler has {bundles.RUNTIME}")
        if library.parent != bundle:
            shutil.copyfile(library, bundle / bundles.RUNTIME)
    manifest = []
    for item in shelves.listing(bundle):
        (kernel,) = plan.of_entry(item.record)
        interface_of = interface.entry(Key(*kernel))
        manifest.append({"file": item.path.relative_to(bundle).as_posix(), **interface_of, **item.record})
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (bundle / "cute_ssm_kernels.h").write_text(interface.header(manifest))


def write_wheel(bundle: Path, folder: Path) -> Path:
    """Pack a bundle as the wheel ``cute-ssm-aot`` and return its path."""
    version = cute_ssm.__version__
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    info = f"cute_ssm_aot-{version}.dist-info"
    path = folder / f"cute_ssm_aot-{version}-{tag}.whl"
    files = {f"{bundles.PACKAGE}/__init__.py": INIT.encode()}
    files |= {f"{bundles.PACKAGE}/kernels/{name}": data for name, data in contents(bundle)}
    files[f"{info}/METADATA"] = METADATA.format(version=version).encode()
    files[f"{info}/WHEEL"] = WHEEL.format(version=version, tag=tag).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        record = []
        for name, data in files.items():
            wheel.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(data)}\n")
        wheel.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
    return path


def contents(bundle: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every file of a bundle."""
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            yield path.relative_to(bundle).as_posix(), path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
