"""The command line as a whole: its two names, and help that shows calls which work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from cute_ssm import __main__ as cli

COMMANDS = ("env", "cache", "warmup", "tune", "demo")


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    text = help_of(capsys)
    assert re.findall(r"^    (\w+)  ", text, re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_the_command_and_its_examples_parse(command, capsys):
    text = help_of(capsys, command)
    described = text.partition("\n\n")[2].partition("\n\n")[0]
    assert described.endswith(".") and all(len(line) <= 110 for line in described.splitlines())
    examples = re.findall(r"^  python -m cute_ssm (.*)$", text.partition("examples:\n")[2], re.M)
    assert examples
    for example in examples:
        options = cli._parser().parse_args(shlex.split(example.partition(">")[0]))
        assert callable(options.run)


@pytest.mark.parametrize(
    ("called", "name"),
    [("/bin/cute-ssm", "cute-ssm"), ("/lib/cute_ssm/__main__.py", "python -m cute_ssm"), ("", "python -m cute_ssm")],
)
def test_messages_name_the_program_as_it_was_called(called, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    assert help_of(capsys).startswith(f"usage: {name} ")
    assert cli.main(["warmup", "--arch", "sm_90a", "--jobs", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: --jobs: expected")


def test_reader_that_closes_the_pipe_is_no_error():
    """The output is short enough to be written at exit only, where nothing can catch the error."""
    command = [sys.executable, "-m", "cute_ssm", "cache", "ls"]
    environment = {**os.environ, "CUTE_SSM_CACHE": "0", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
