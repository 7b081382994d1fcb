"""A package that is not installed is named with the extra that installs it."""

from __future__ import annotations

import sys

import pytest

from cute_ssm.demo import report, weights
from cute_ssm.integrations import transformers
from cute_ssm.tuner import engines

USES = {
    "matplotlib": (report.pyplot, "demo"),
    "safetensors": (weights._safetensors, "demo"),
    "transformers": (transformers.import_transformers, "hf"),
    "ray": (lambda: engines.Ray("counters", 1), "tune"),
}


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    use, extra = USES[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((ImportError, ValueError), match=rf"{package}.*pip install 'cute-ssm\[{extra}\]'"):
        use()


def test_plots_of_benchmarks_name_their_own_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"cute-ssm\[bench\]"):
        report.pyplot("bench")
