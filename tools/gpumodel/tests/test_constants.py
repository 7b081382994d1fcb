"""The constants of the machine model: each names its source, and each source is described."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import gpumodel
from gpumodel import constants

SOURCE = Path(constants.__file__).read_text()
DESCRIBED = re.findall(r"^([A-Z])  \S", constants.__doc__, re.M)
LETTER = re.compile(r"\b([A-Z])(?=[:;,.)]|$| nominal| for)")
OF_EACH_MACHINE = [f.name for f in dataclasses.fields(gpumodel.Machine) if f.default is dataclasses.MISSING]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(gpumodel.Machine)])
def test_each_constant_names_its_source(name):
    if name in OF_EACH_MACHINE or name == "fitted":
        return  # beside the machines
    found = re.search(rf"^    {name}: \w.*", SOURCE, re.M)
    title = re.findall(r"^    # (.*)", SOURCE[: found.start()], re.M)[-1]
    comment = found.group().partition("#")[2]
    assert LETTER.search(comment) or LETTER.search(title), f"{name}: no letter of a source in {comment!r}"


def test_the_figures_of_each_machine_name_their_sources():
    for name, text in re.findall(r"^(H100|H200|B200|B300) = \w+\(\n(.*?)^\)", SOURCE, re.M | re.S):
        for line in text.splitlines():
            assert LETTER.search(line.partition("#")[2]), f"{name}: {line.strip()}"


def test_letters_of_sources_are_described_and_used():
    code = SOURCE.replace(constants.__doc__, "")
    used = {letter for comment in re.findall(r"#(.*)", code) for letter in LETTER.findall(comment)}
    assert used == set(DESCRIBED)
    assert len(DESCRIBED) == len(used)
