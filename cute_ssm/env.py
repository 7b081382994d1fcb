"""The environment variables, read on first use.  No other module of the package reads the environment."""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cute_ssm import arch as archs
from cute_ssm.errors import UnsupportedArchError, describe

PREFIX = "CUTE_SSM_"
VLLM_PARTS = ("ssu", "replay", "gdn")
LOG_LEVELS = {"off": logging.WARNING, "compile": logging.INFO, "calls": logging.DEBUG}


@dataclass(frozen=True)
class Variable:
    """An environment variable, as the documentation and ``python -m cute_ssm env`` list it."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("CUTE_SSM_CACHE_DIR", "$XDG_CACHE_HOME/cute_ssm or ~/.cache/cute_ssm", "folder of compiled kernels"),
    Variable("CUTE_SSM_CACHE", "1", "0: neither read nor write compiled kernels on disk"),
    Variable("CUTE_SSM_ARCH", "that of the GPU", f"compile for this target: {', '.join(archs.ARCHS)}"),
    Variable("CUTE_SSM_AOT_DIR", "none", "folders of kernels compiled ahead of time, separated by colons"),
    Variable(
        "CUTE_SSM_LOG",
        "off",
        "off, compile (compilations, cache, what runs by the reference), calls (path and arguments of every call too)",
    ),
    Variable("CUTE_SSM_TUNING_DIR", "none", "folder of measured configs, preferred to the package's own"),
    Variable(
        "CUTE_SSM_VLLM",
        "none",
        "parts of vLLM that run through this package: ssu, replay and gdn, separated by commas, or all",
    ),
    Variable(
        "CUTE_SSM_STRICT", "0", "1: calls of vLLM and SGLang that no operator supports raise, and run nowhere else"
    ),
    Variable("VLLM_TUNED_CONFIG_FOLDER", "none", "vLLM's folder of tuned configs, which `cute_ssm.compat.vllm` reads"),
)


@dataclass(frozen=True)
class Settings:
    """The settings that the environment variables select.

    Attributes
    ----------
    cache_dir : Path or None
        Folder of compiled kernels; None: the disk cache is off.
    arch : Arch or None
        Compile target; None: that of the GPU.
    aot_dirs : tuple of Path
        Read-only folders searched before the cache.
    log : str
        ``"off"``, ``"compile"`` or ``"calls"``.
    tuning_dir : Path or None
        Folder of measured configs, or None.
    """

    cache_dir: Path | None
    arch: archs.Arch | None
    aot_dirs: tuple[Path, ...]
    log: str
    tuning_dir: Path | None = None


@functools.cache
def settings() -> Settings:
    """Return the settings, read at the first call; ``settings.cache_clear()`` makes the next call read them again.

    Raises
    ------
    ValueError
        If a variable has an invalid value; the message names the variable.
    """
    return Settings(
        cache_dir=_cache_dir() if _choice("CUTE_SSM_CACHE", "1", ("0", "1")) == "1" else None,
        arch=_arch(),
        aot_dirs=tuple(_folder(part) for part in _value("CUTE_SSM_AOT_DIR").split(":") if part),
        log=_choice("CUTE_SSM_LOG", "off", tuple(LOG_LEVELS)),
        tuning_dir=_folder(_value("CUTE_SSM_TUNING_DIR")) if _value("CUTE_SSM_TUNING_DIR") else None,
    )


@functools.cache
def logger() -> logging.Logger:
    """Return the logger ``cute_ssm``; the first call sets its level from CUTE_SSM_LOG.

    If the variable is set and the application has no handlers of its own, messages go to standard error.
    """
    log = logging.getLogger("cute_ssm")
    wanted = settings().log
    if wanted != "off":
        log.setLevel(LOG_LEVELS[wanted])
        if not log.hasHandlers():
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            log.addHandler(handler)
    return log


def vllm_parts() -> tuple[str, ...]:
    """Return the parts that CUTE_SSM_VLLM names, of `VLLM_PARTS`.

    Raises
    ------
    ValueError
        It names another one.
    """
    names = [name.strip() for name in _value("CUTE_SSM_VLLM").split(",") if name.strip()]
    if names == ["all"]:
        return VLLM_PARTS
    wrong = [name for name in names if name not in VLLM_PARTS]
    if wrong:
        expected = f"all, or some of {', '.join(VLLM_PARTS)}"
        raise ValueError(describe("CUTE_SSM_VLLM", expected, repr(wrong[0]), "correct or unset the variable"))
    return tuple(part for part in VLLM_PARTS if part in names)


def strict() -> bool:
    """Return whether CUTE_SSM_STRICT is set: engines' calls that no operator supports raise."""
    return _choice("CUTE_SSM_STRICT", "0", ("0", "1")) == "1"


def vllm_tuned_config_folder() -> Path | None:
    """Return the folder that vLLM's variable names, or None.  Reads the environment at every call; callers cache it."""
    text = _value("VLLM_TUNED_CONFIG_FOLDER")
    return _folder(text) if text else None


def present() -> dict[str, str]:
    """Return the listed variables that are set, and unknown ones that start with CUTE_SSM_."""
    known = {variable.name for variable in VARIABLES}
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIX) or name in known}


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = _value(name) or default
    if value not in choices:
        raise ValueError(describe(name, f"one of {', '.join(choices)}", repr(value), "correct or unset the variable"))
    return value


def _arch() -> archs.Arch | None:
    name = _value("CUTE_SSM_ARCH")
    if not name:
        return None
    try:
        return archs.by_name(name)
    except UnsupportedArchError:
        choices = f"one of {', '.join(archs.ARCHS)}"
        raise ValueError(describe("CUTE_SSM_ARCH", choices, repr(name), "correct or unset the variable")) from None


def _cache_dir() -> Path | None:
    chosen = _value("CUTE_SSM_CACHE_DIR")
    if chosen:
        return _folder(chosen)
    base = _value("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "cute_ssm"
    try:
        return Path.home() / ".cache" / "cute_ssm"
    except RuntimeError:  # no home folder; a shared temporary folder would let other users plant code
        return None


def own_tuning_dir() -> Path | None:
    """Return the user's folder for measured configs; operators read it only if CUTE_SSM_TUNING_DIR names it."""
    base = _value("XDG_CONFIG_HOME")
    try:
        root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    except RuntimeError:
        return None
    return root / "cute_ssm" / "tuning"


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        return Path(text).absolute()
