"""Environment variables: read in one place, once, and checked."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import cute_ssm
from cute_ssm import arch, env

PACKAGE = Path(cute_ssm.__file__).parent


def test_only_env_reads_the_environment():
    reading = re.compile(r"\benvironb?\b|\bgetenv|expanduser|expandvars|Path\.home")
    readers = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if reading.search(path.read_text())
    }
    assert readers == {"env.py"}


def test_the_table_lists_exactly_the_variables_that_are_read():
    source = (PACKAGE / "env.py").read_text().split("@functools.cache", 1)[1]
    assert set(re.findall(r"_(?:value|choice)\(\"((?:CUTE_SSM|VLLM)_\w+)\"", source)) == {
        row.name for row in env.VARIABLES
    }


def test_defaults(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert env.settings() == env.Settings(tmp_path / ".cache/cute_ssm", None, (), "off")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert env.settings().cache_dir == tmp_path / ".cache/cute_ssm", "settings are read once"
    settings()
    assert env.settings().cache_dir == Path("/elsewhere/cute_ssm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    settings()
    assert env.settings().cache_dir == tmp_path / ".cache/cute_ssm", "the XDG standard ignores relative folders"


def test_values(settings, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    settings(CACHE_DIR="~/kernels", ARCH="sm_100a", AOT_DIR="/a:/b/c:", LOG="compile", TUNING_DIR="/configs")
    folders = (Path("/a"), Path("/b/c"))
    assert env.settings() == env.Settings(
        Path("/home/somebody/kernels"), arch.SM_100A, folders, "compile", Path("/configs")
    )
    settings(CACHE="0")
    assert env.settings().cache_dir is None
    settings(CACHE="", LOG="", ARCH="")
    assert env.settings().log == "off"
    assert env.settings().arch is None


@pytest.mark.parametrize(("name", "value"), [("ARCH", "sm_80"), ("CACHE", "yes"), ("LOG", "debug")])
def test_a_bad_value_names_its_variable(settings, name, value):
    settings(**{name: value})
    with pytest.raises(ValueError, match=rf"CUTE_SSM_{name}: expected one of .*, got '{value}'"):
        env.settings()


def test_logger_level_follows_the_variable(settings):
    log = logging.getLogger("cute_ssm")
    before = log.level, list(log.handlers)
    try:
        settings(LOG="compile")
        assert not env.logger().isEnabledFor(logging.DEBUG)
        assert env.logger().isEnabledFor(logging.INFO)
        settings(LOG="calls")
        assert env.logger().isEnabledFor(logging.DEBUG)
    finally:
        log.setLevel(before[0])
        log.handlers[:] = before[1]
