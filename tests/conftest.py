"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from cute_ssm import env, runtime
from cute_ssm.runtime.store import Store


def _forget() -> None:
    env.settings.cache_clear()
    env.logger.cache_clear()
    runtime.forget()
    Store.warned.clear()


@pytest.fixture
def settings(monkeypatch):
    """Set variables of the environment for one test, all others of this package unset: ``settings(CACHE="0")``."""
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
