"""What a launch and a tensor map are refused for: every rule broken once."""

import dataclasses
import struct

import pytest

from gpushim.checks import Attribute, Config, Device, Error, Function, Refusal, check_launch, problems_of_maps
from ptxsim import tensormap
from ptxsim.cubin import Kernel, Param

KERNEL = Kernel("kernel", registers=64)
CONFIG = Config((4, 1, 1), (128, 1, 1), 0, 0, {})
BIG = {Function.MAX_DYNAMIC_SHARED: 232448}
CLUSTERS = {n: {Attribute.CLUSTER: struct.pack("<3I", n, 1, 1)} for n in (1, 2, 3, 8, 16)}


def number(value):
    return struct.pack("<i", value)


def check(kernel=None, settings=None, **config):
    check_launch(
        dataclasses.replace(KERNEL, **(kernel or {})),
        dataclasses.replace(CONFIG, **config),
        Device("sm_90a", 132),
        settings or {},
    )


ACCEPTED = {
    "plain": {},
    "48 KB without asking": {"shared": 49152},
    "227 KB, asked for": {"shared": 232448, "settings": BIG},
    "static and dynamic, 227 KB": {"shared": 231424, "kernel": {"static_shared": 1024}, "settings": BIG},
    "all registers": {"block": (1024, 1, 1), "kernel": {"registers": 64}},
    "largest grid": {"grid": (2**31 - 1, 65535, 65535)},
    "cluster of 8": {"grid": (16, 1, 1), "attributes": CLUSTERS[8]},
    "cluster of 16, asked for": {
        "grid": (16, 1, 1), "attributes": CLUSTERS[16], "settings": {Function.NON_PORTABLE_CLUSTER: 1},
    },
    "cooperative": {"attributes": {Attribute.COOPERATIVE: number(1)}, "grid": (132 * 16, 1, 1)},
    "dependent": {"attributes": {Attribute.PROGRAMMATIC_STREAM_SERIALIZATION: number(1)}},
}  # fmt: skip
REFUSED = {
    "48 KB and one byte without asking": ({"shared": 49153}, Error.cudaErrorInvalidValue),
    "static counts too": ({"shared": 49152, "kernel": {"static_shared": 16}}, Error.cudaErrorInvalidValue),
    "more than was asked for": (
        {"shared": 100001, "settings": {Function.MAX_DYNAMIC_SHARED: 100000}}, Error.cudaErrorInvalidValue,
    ),
    "static and dynamic above 227 KB": (
        {"shared": 232448, "kernel": {"static_shared": 16}, "settings": BIG}, Error.cudaErrorInvalidValue,
    ),
    "registers": ({"block": (1024, 1, 1), "kernel": {"registers": 65}}, Error.cudaErrorLaunchOutOfResources),
    "no threads": ({"block": (0, 1, 1)}, Error.cudaErrorInvalidConfiguration),
    "1025 threads": ({"block": (1025, 1, 1)}, Error.cudaErrorInvalidConfiguration),
    "65 threads in z": ({"block": (1, 1, 65)}, Error.cudaErrorInvalidConfiguration),
    "block of another kernel": ({"kernel": {"reqntid": (64, 1, 1)}}, Error.cudaErrorInvalidConfiguration),
    "block above the bound": ({"kernel": {"max_threads": (64, 1, 1)}}, Error.cudaErrorInvalidConfiguration),
    "empty grid": ({"grid": (0, 1, 1)}, Error.cudaErrorInvalidConfiguration),
    "grid x": ({"grid": (2**31, 1, 1)}, Error.cudaErrorInvalidConfiguration),
    "grid y": ({"grid": (1, 65536, 1)}, Error.cudaErrorInvalidConfiguration),
    "cluster does not divide the grid": ({"attributes": CLUSTERS[3]}, Error.cudaErrorInvalidConfiguration),
    "cluster of 16": ({"grid": (16, 1, 1), "attributes": CLUSTERS[16]}, Error.cudaErrorInvalidConfiguration),
    "cluster of another kernel": (
        {"attributes": CLUSTERS[2], "kernel": {"cluster": (4, 1, 1)}}, Error.cudaErrorInvalidConfiguration,
    ),
    "cooperative grid": (
        {"attributes": {Attribute.COOPERATIVE: number(1)}, "grid": (132 * 16 + 1, 1, 1)},
        Error.cudaErrorCooperativeLaunchTooLarge,
    ),
    "serialization of 2": (
        {"attributes": {Attribute.PROGRAMMATIC_STREAM_SERIALIZATION: number(2)}}, Error.cudaErrorInvalidValue,
    ),
    "carveout of 101": ({"attributes": {Attribute.CARVEOUT: number(101)}}, Error.cudaErrorInvalidValue),
    "unknown attribute": ({"attributes": {99: number(1)}}, Error.cudaErrorNotSupported),
}  # fmt: skip


@pytest.mark.parametrize("launch", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(launch):
    check(**launch)


@pytest.mark.parametrize(("launch", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(launch, code):
    with pytest.raises(Refusal) as raised:
        check(**launch)
    assert raised.value.code is code


MAP = {"address": 1 << 20, "dtype": "f32", "dims": (64, 16), "strides": (256,), "box": (32, 8), "swizzle": 128}


def problems(raw, bank_offset=512):
    kernel = Kernel("kernel", params=[Param(0, 0, 128)], bank_offset=bank_offset)
    return list(problems_of_maps(kernel, [raw]))


def broken(word, bits):
    """Return a map with other bits in one of its words."""
    words = list(struct.unpack("<16Q", tensormap.encode(**MAP)))
    words[word] ^= bits
    return struct.pack("<16Q", *words)


def test_good_map():
    assert problems(tensormap.encode(**MAP)) == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (broken(0, 8), "address"),
        (broken(1, 256 >> 4 << 32), "stride 0"),
        (broken(6, 31 << 56 ^ 39 << 56), "swizzle"),
        (broken(6, 31 << 56 ^ 2 << 56), "12 bytes"),
        (broken(1, 1 << 21), "bits"),
        (broken(1, 2), "not a tensor map"),
    ],
    ids=["address", "stride", "wide box", "short row", "size bit", "type"],
)
def test_broken_map(raw, words):
    found = problems(raw)
    assert found and any(words in problem for problem in found), found


def test_map_at_an_odd_place_of_the_parameter_block():
    assert "multiple of 64" in problems(tensormap.encode(**MAP), bank_offset=528)[0]
