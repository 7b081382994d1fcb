"""`cute_ssm.compat` has the parameters of the functions that it follows: names, order, defaults."""

from __future__ import annotations

import inspect
import json

import peer_doubles
import peer_signatures
import pytest

from cute_ssm.compat import fla, sglang, vllm
from cute_ssm.compat.flashinfer import gdn_decode, mamba
from cute_ssm.compat.vllm import gated_delta
from cute_ssm.integrations import _engines
from cute_ssm.integrations import sglang as in_sglang
from cute_ssm.integrations import vllm as in_vllm

TABLE = json.loads(peer_signatures.TABLE.read_text())
EACH = [(name, path) for name, package in TABLE.items() for path in package["functions"]]
OURS = {
    "flashinfer/mamba": mamba,
    "flashinfer/gdn_decode.py": gdn_decode,
    "fla/ops": fla,
    "vllm/model_executor/layers/mamba/ops": vllm,
    "vllm/third_party/flash_linear_attention": gated_delta,
    "sglang/kernels/ops": sglang,
}
VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


HOOKS = [
    (package, hook)
    for package, module in (("vllm", in_vllm), ("sglang", in_sglang))
    for hooks in (value for name, value in vars(module).items() if name.endswith("_HOOKS"))
    for hook in hooks
]


def parameters(package: str, path: str) -> list[inspect.Parameter]:
    """Those of a function in the table."""
    return list(peer_doubles.signature(TABLE[package], path).parameters.values())


def ours(path: str):
    place, _, name = path.partition("::")
    return getattr(next(module for prefix, module in OURS.items() if place.startswith(prefix)), name)


@pytest.mark.parametrize(("package", "path"), EACH)
def test_parameters_are_those_of_the_peer(package, path):
    wanted = parameters(package, path)
    found = {name: p for name, p in inspect.signature(ours(path)).parameters.items()}
    more = [found.pop(name) for name in list(found) if name not in {p.name for p in wanted}]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more), "extensions change no call"
    assert list(found) == [p.name for p in wanted], f"{package} {TABLE[package]['version']}"
    for p in wanted:
        mine = found[p.name]
        assert mine.kind is p.kind, p.name
        if p.kind not in VARIADIC and p.default is not p.empty:
            assert mine.default == p.default, p.name


@pytest.mark.parametrize(("package", "hook"), HOOKS, ids=[hook.name for _, hook in HOOKS])
def test_integrations_expect_the_parameters_of_the_table(package, hook):
    path = f"{hook.module.replace('.', '/')}.py::{hook.name}"
    assert hook.parameters == _engines.parameters(peer_doubles.function(TABLE[package], path))


def test_every_hook_of_the_table_is_expected_by_an_integration():
    expected = {f"{hook.module.replace('.', '/')}.py::{hook.name}" for _, hook in HOOKS}
    assert {path for package in TABLE.values() for path in package.get("hooks", ())} <= expected


@pytest.mark.parametrize("package", TABLE)
def test_an_installed_package_has_the_signatures_of_the_table(package):
    place = peer_signatures.installed(package)
    if place is None:
        pytest.skip(f"{package} is not installed")
    found = peer_signatures.found(place[0], TABLE[package])
    assert not peer_signatures.differences(TABLE[package], found, f"{package} {place[1]}")


def test_drift_is_told_with_both_versions(tmp_path):
    source = "def step(state: int, x, *, scale: float = 1.0, **kwargs) -> int:\n    return 0\n"
    assert peer_signatures.read(source, "step") == "state, x, *, scale=1.0, **kwargs"
    with pytest.raises(LookupError, match="stride"):
        peer_signatures.read(source, "stride")
    (tmp_path / "ops.py").write_text(source)
    (tmp_path / "names.py").write_text("import os\nPAD = 1\n")
    with pytest.raises(LookupError, match="NULL"):
        peer_signatures.constant("NULL = int()", "NULL")
    functions, constants = {"ops.py::step": "state, x"}, {"names.py::PAD": 0}
    package = {"version": "1.0", "functions": functions, "constants": constants}
    found = peer_signatures.found(tmp_path, package)
    assert peer_signatures.differences(package, found, "peer 1.1") == [
        "ops.py::step: peer 1.1 has (state, x, *, scale=1.0, **kwargs), the table, of 1.0, (state, x)",
        "names.py::PAD: peer 1.1 has (1), the table, of 1.0, (0)",
    ]
    same = {"functions": {"ops.py::step": found["ops.py::step"]}, "constants": {"names.py::PAD": 1}}
    assert not peer_signatures.differences({**package, **same}, found, "peer 1.1")
