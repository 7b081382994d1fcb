"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex

import kernel_backends
import pytest
import shim
import slices

from cute_ssm import env, runtime
from cute_ssm.runtime.store import Store


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run on the GPU what runs in the emulator otherwise")
    parser.addoption(
        "--arithmetic",
        choices=("exact", "hardware"),
        default="exact",
        help="how approximate functions err in the emulator; with hardware only the tests that depend on it run",
    )
    parser.addoption("--shim", metavar="TARGET,...", help="give this process such GPUs, which are not there: gpushim")


def pytest_configure(config):
    if config.getoption("--shim"):
        shim.install(config)
    for name in ("gpu", "arithmetic"):
        restore = functools.partial(setattr, kernel_backends, name, getattr(kernel_backends, name))
        config.add_cleanup(restore)  # of the pytest that this one may run within
        setattr(kernel_backends, name, config.getoption(f"--{name}"))


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config, items):
    import torch

    slices.mark(items)
    if config.getoption("--arithmetic") != "exact":
        config.hook.pytest_deselected(items=[item for item in items if not kernel_backends.runs_a_kernel(item)])
        items[:] = [item for item in items if kernel_backends.runs_a_kernel(item)]
    shim.mark(items)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def repeat_command(item: pytest.Item) -> str:
    """The shell command that runs this one test again."""
    words = ["pytest", item.nodeid]
    if item.config.getoption("--gpu"):
        words.append("--gpu")
    if item.config.getoption("--arithmetic") != "exact":
        words += ["--arithmetic", item.config.getoption("--arithmetic")]
    if item.config.getoption("--shim"):
        words += ["--shim", item.config.getoption("--shim")]
    for marker in ("slow", "wide"):  # a plain run leaves them out
        if item.get_closest_marker(marker):
            words += ["-m", marker]
            break
    return shlex.join(words)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add to each failure the command that repeats it."""
    report = yield
    if report.failed:
        report.sections.append(("repeat with", repeat_command(item)))
    return report


@pytest.fixture
def backend(request):
    """Open the way that kernels run: ``with backend("sm_100a", sm_count=1): ...``; see `kernel_backends`."""
    return kernel_backends.BACKENDS[getattr(request, "param", "kernel")]


@pytest.fixture(autouse=True)
def _driver():
    """Where GPUs are those of gpushim, fail a test whose launches a driver accepts, and that are wrong all the same."""
    with shim.watched() if shim.active() else contextlib.nullcontext():
        yield


def _forget() -> None:
    env.settings.cache_clear()
    env.logger.cache_clear()
    runtime.forget()
    Store.warned.clear()


@pytest.fixture
def settings(monkeypatch, tmp_path_factory):
    """Set variables of the environment for one test, all others of this package unset: ``settings(CACHE="0")``.

    The cache lies where the run's own does, or in a folder of the run: never in the user's.
    """
    own = os.environ.get("CUTE_SSM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", own or str(tmp_path_factory.getbasetemp() / "caches"))
    for name in env.present():
        monkeypatch.delenv(name)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(env.PREFIX + name, str(value))
        _forget()

    change()
    yield change
    monkeypatch.undo()
    _forget()
