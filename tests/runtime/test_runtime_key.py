"""Spec, config and target are the cache key: whatever changes one of them changes keys and file names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_spec import TinyConfig, TinySpec

import cute_ssm
from cute_ssm import arch
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops import operators
from cute_ssm.ops.selective_state_update.config import SelectiveStepConfig
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.runtime import registry, toolchain
from cute_ssm.runtime.store import Key
from cute_ssm.spec import Config, Spec

SPECS = (
    TinySpec(),
    SelectiveStateUpdateSpec(
        **{
            field.name: {"dim": 64, "dstate": 128}.get(field.name, "float32" if field.name.endswith("dtype") else True)
            for field in dataclasses.fields(SelectiveStateUpdateSpec)
        }
    ),
)
CONFIGS = (
    TinyConfig(),
    SelectiveStepConfig(**{field.name: 4 for field in dataclasses.fields(SelectiveStepConfig)}),
)


def changed(value):
    if isinstance(value, bool):
        return not value
    if value is None or isinstance(value, str):
        return f"{value}x"
    return value + 1


def variants(instance):
    """The instance, and for every field a copy that differs in it."""
    yield instance
    for field in dataclasses.fields(instance):
        yield dataclasses.replace(instance, **{field.name: changed(getattr(instance, field.name))})
    for field in dataclasses.fields(instance):
        if "None" in str(field.type):
            yield dataclasses.replace(instance, **{field.name: None})


@pytest.mark.parametrize(
    ("spec", "config"), list(zip(SPECS, CONFIGS, strict=True)), ids=lambda value: type(value).__name__
)
def test_every_field_changes_key_and_file_name(spec, config):
    keys = [Key(each, config, arch.SM_90A) for each in variants(spec)]
    keys += [Key(spec, each, arch.SM_90A) for each in list(variants(config))[1:]]
    keys += [Key(spec, config, dataclasses.replace(arch.SM_90A, **{field.name: "changed"}))
             for field in dataclasses.fields(arch.Arch)]  # fmt: skip
    assert len(keys) >= 1 + len(dataclasses.fields(spec)) + len(dataclasses.fields(config))
    for property_ in ("name", "digest", "function"):
        assert len({getattr(key, property_) for key in keys}) == len(keys)
    assert len({(key.spec, key.config, key.arch) for key in keys}) == len(keys)


def test_file_names_are_readable_and_the_same_in_every_process():
    key = Key(TinySpec(), TinyConfig(), arch.SM_90A)
    assert key.name == f"tiny-float32-{key.digest}"
    assert key.name == Key(TinySpec(), TinyConfig(), arch.SM_90A).name
    assert len(key.digest) == 12


def test_types_with_equal_fields_have_different_keys():
    @dataclasses.dataclass(frozen=True)
    class Other(Config):
        threads: int = 128

    assert Key(TinySpec(), TinyConfig(), arch.SM_90A).digest != Key(TinySpec(), Other(), arch.SM_90A).digest


def test_the_source_of_a_kernel_from_outside_is_in_the_key():
    assert registry.fingerprint(SPECS[0]).startswith("tiny_kernel:Tiny#")
    assert registry.fingerprint(SPECS[1]) == "cute_ssm.ops.selective_state_update.kernel:SelectiveStep"


def test_sources_of_the_toolchain_digest_hold_everything_that_kernels_import():
    """All modules that importing every kernel loads, but for those that only find, cache and launch kernels."""
    code = (
        "import sys; from cute_ssm.ops import operators\n"
        "for operator in operators(): operator.module('kernel')\n"
        "print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('cute_ssm')), sep='\\n')"
    )
    root = Path(cute_ssm.__file__).parent
    here = root.parent  # so that the process finds the package that is tested, installed or not
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    loaded = {Path(line) for line in done.stdout.splitlines()}
    host = {root / name for name in ("__init__.py", "env.py", "errors.py")}
    host |= {file for file in loaded if file.is_relative_to(root / "runtime")}
    assert {operator.module("kernel").__file__ for operator in operators()} <= set(map(str, loaded))
    assert not sorted(loaded - host - set(toolchain._sources()))


def test_registering():
    registry.register(TinySpec, "tiny_kernel:Tiny")
    with pytest.raises(ValueError, match="spec_type: expected a type without a kernel, got TinySpec"):
        registry.register(TinySpec, "elsewhere:Tiny")
    with pytest.raises(ValueError, match="path: expected 'module:Class'"):
        registry.register(TinySpec, "tiny_kernel.Tiny")

    class Unknown(Spec):
        pass

    with pytest.raises(UnsupportedSpecError, match="got Unknown"):
        registry.kernel_path(Unknown())
    assert registry.kernel_class(TinySpec()).__name__ == "Tiny"
    assert registry.default_config(TinySpec(), arch.SM_90A) == TinyConfig()
