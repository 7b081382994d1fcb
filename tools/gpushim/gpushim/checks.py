"""What a driver refuses of a launch, and what it would have refused of a tensor map."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from ptxsim import UnsupportedInstruction, tensormap
from ptxsim.cubin import RESERVED, Kernel

Dims = tuple[int, int, int]

SM_SHARED = 233472  # bytes of an SM
MOST_SHARED = SM_SHARED - RESERVED  # 227 KB, static and dynamic, of a CTA that asks for it
PLAIN_SHARED = 49152  # of one that does not
REGISTERS, UNIT, WARPS_TOGETHER = 65536, 256, 4  # of an SM; what a warp's are rounded up to; warps of one allocation
MOST_THREADS, SM_THREADS, SM_CTAS, WARP = 1024, 2048, 32, 32
PORTABLE_CLUSTER, MOST_CLUSTER = 8, 16
MAP_BYTES = 128


class Error(IntEnum):
    """Codes of ``cudaError_t``."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorInvalidConfiguration = 9
    cudaErrorInvalidDevice = 101
    cudaErrorNoKernelImageForDevice = 209
    cudaErrorInvalidResourceHandle = 400
    cudaErrorSymbolNotFound = 500
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchOutOfResources = 701
    cudaErrorLaunchFailure = 719
    cudaErrorCooperativeLaunchTooLarge = 720
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900


class Function(IntEnum):
    """Attributes of a kernel, ``cudaFuncAttribute``, that can be set."""

    MAX_DYNAMIC_SHARED = 8
    CARVEOUT = 9
    NON_PORTABLE_CLUSTER = 14


class Attribute(IntEnum):
    """Attributes of a launch, ``cudaLaunchAttributeID``."""

    COOPERATIVE = 2
    CLUSTER = 4
    PROGRAMMATIC_STREAM_SERIALIZATION = 6
    PRIORITY = 8
    CARVEOUT = 14


class Refusal(RuntimeError):
    """What a call of the runtime returns instead of doing what it is asked for."""

    def __init__(self, code: Error, words: str):
        super().__init__(f"{code.name}: {words}")
        self.code = code


class Device(NamedTuple):
    """A GPU of this process."""

    arch: str = "sm_90a"
    sm_count: int = 132

    @classmethod
    def parse(cls, text: str) -> Device:
        """Return the device that "sm_90a", or "sm_90a:132" with its number of SMs, names."""
        known = {"sm_90a": "132", "sm_100a": "148", "sm_103a": "148"}
        found = re.fullmatch(r"(sm_\d+[af]?):([1-9]\d*)", text if ":" in text else f"{text}:{known.get(text)}")
        if found is None:
            raise ValueError(
                f"devices: expected {', '.join(known)}, or another with its SMs, sm_120a:188; got {text!r}"
            )
        return cls(found[1], int(found[2]))

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.number, 10)

    @property
    def number(self) -> int:
        """90 for sm_90a."""
        return int("".join(c for c in self.arch if c.isdigit()))


@dataclass(frozen=True)
class Config:
    """The configuration of one launch; ``attributes`` are the bytes of each value by its number."""

    grid: Dims
    block: Dims
    shared: int
    stream: int
    attributes: dict[int, bytes]

    @classmethod
    def read(cls, raw: bytes, attributes: dict[int, bytes]) -> Config:
        """Return what 56 bytes of ``cudaLaunchConfig_t`` and its attributes say."""
        values = struct.unpack_from("<6I", raw)
        shared, stream = struct.unpack_from("<QQ", raw, 24)
        sizes = {Attribute.CLUSTER: 12}  # of the 64 bytes of any value; the others are not written
        known = {number: value[: sizes.get(number, 4)] for number, value in attributes.items()}
        return cls(values[:3], values[3:], shared, stream, known)

    def integer(self, attribute: Attribute) -> int:
        """Return the value of an attribute that is a number; 0 if it is not set."""
        return struct.unpack_from("<i", self.attributes.get(attribute, bytes(4)))[0]

    def cluster(self, kernel: Kernel) -> Dims:
        """Return the size of a cluster: that of the launch, else that of the kernel."""
        if Attribute.CLUSTER in self.attributes:
            return struct.unpack_from("<3I", self.attributes[Attribute.CLUSTER])
        return kernel.cluster or (1, 1, 1)

    @property
    def threads(self) -> int:
        return math.prod(self.block)


def check_launch(kernel: Kernel, config: Config, device: Device, settings: dict[int, int]) -> None:
    """Raise `Refusal` for a launch that a driver refuses; ``settings``: the kernel's attributes on this device."""
    _check_sizes(kernel, config)
    allowed = settings.get(Function.MAX_DYNAMIC_SHARED, PLAIN_SHARED - kernel.static_shared)
    if config.shared > allowed or config.shared + kernel.static_shared > MOST_SHARED:
        raise Refusal(
            Error.cudaErrorInvalidValue,
            f"{config.shared} bytes of dynamic and {kernel.static_shared} of static shared memory, {allowed} allowed",
        )
    warps = -(-config.threads // (WARP * WARPS_TOGETHER)) * WARPS_TOGETHER
    if -(-kernel.registers * WARP // UNIT) * UNIT * warps > REGISTERS:
        raise Refusal(Error.cudaErrorLaunchOutOfResources, f"{kernel.registers} registers, {config.threads} threads")
    _check_attributes(kernel, config, device)
    cluster = config.cluster(kernel)
    most = MOST_CLUSTER if settings.get(Function.NON_PORTABLE_CLUSTER) else PORTABLE_CLUSTER
    if not 1 <= math.prod(cluster) <= most or any(g % c for g, c in zip(config.grid, cluster)):
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"cluster {cluster} of grid {config.grid}")
    if kernel.cluster and tuple(kernel.cluster) != tuple(cluster):
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"cluster {cluster}, compiled for {kernel.cluster}")


def _check_sizes(kernel: Kernel, config: Config) -> None:
    grid, block = config.grid, config.block
    if min(block) < 1 or config.threads > MOST_THREADS or block[2] > 64:
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"block {block}")
    if kernel.reqntid and block != tuple(kernel.reqntid):
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"block {block}, compiled for {kernel.reqntid}")
    if kernel.max_threads and config.threads > math.prod(kernel.max_threads):
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"block {block}, compiled for at most {kernel.max_threads}")
    if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
        raise Refusal(Error.cudaErrorInvalidConfiguration, f"grid {grid}")


def _check_attributes(kernel: Kernel, config: Config, device: Device) -> None:
    for number in config.attributes:
        if number not in list(Attribute):
            raise Refusal(Error.cudaErrorNotSupported, f"launch attribute {number} is not modelled")
    if config.integer(Attribute.PROGRAMMATIC_STREAM_SERIALIZATION) not in (0, 1):
        raise Refusal(Error.cudaErrorInvalidValue, "programmatic stream serialization is neither 0 nor 1")
    if not -1 <= config.integer(Attribute.CARVEOUT) <= 100:
        raise Refusal(Error.cudaErrorInvalidValue, f"carveout of {config.integer(Attribute.CARVEOUT)} percent")
    if config.integer(Attribute.COOPERATIVE):
        shared = config.shared + kernel.static_shared + RESERVED
        resident = min(SM_THREADS // config.threads, SM_CTAS, SM_SHARED // shared)
        if math.prod(config.grid) > resident * device.sm_count:
            raise Refusal(Error.cudaErrorCooperativeLaunchTooLarge, f"cooperative grid {config.grid}")


def problems_of_maps(kernel: Kernel, values: list[bytes]) -> Iterator[str]:
    """Yield what ``cuTensorMapEncodeTiled`` would refuse of the tensor maps among the parameters.

    Host code that encodes them itself is refused by nobody: the kernel hangs or reads other memory.  A parameter of 128
    bytes is a tensor map.
    """
    for param, raw in zip(kernel.params, values):
        if param.size != MAP_BYTES:
            continue
        where = f"tensor map {param.ordinal}"
        address = kernel.bank_offset + param.offset
        if address % 64:
            yield f"{where} is at {address} of the constant bank, which is no multiple of 64"
        try:
            map_ = tensormap.decode(raw)
            yield from (f"{where}: {words}" for words in _problems_of_map(map_, raw))
        except (ValueError, UnsupportedInstruction) as error:
            yield f"{where}: {error}"


def _problems_of_map(map_: tensormap.TensorMap, raw: bytes) -> Iterator[str]:
    strides, inner, span = map_.strides[1:], map_.element_size * map_.box[0], (0, 32, 64, 128)[map_.swizzle]
    if map_.address % 16 or any(s % 16 or not 0 <= s < 1 << 40 for s in strides):
        yield f"address {map_.address:#x} and strides {strides} are not multiples of 16, or too large"
    if any(s == 0 and d > 1 for s, d in zip(strides, map_.dims[1:])):
        yield f"stride 0 of a dimension of sizes {map_.dims}"
    if any(not 1 <= b <= 256 for b in map_.box) or any(not 1 <= d <= 1 << 32 for d in map_.dims):
        yield f"sizes {map_.dims}, box {map_.box}"
    if inner % 16 or (span and inner > span):
        yield f"a row of the box has {inner} bytes, and the swizzle spans {span}"
    promotion = struct.unpack_from("<Q", raw, 8)[0] >> 17 & 3
    arguments = (map_.address, map_.dtype, map_.dims, strides, map_.box, span, map_.nan_fill, promotion)
    again = tensormap.encode(*arguments)
    if again[:64] != raw[:64]:
        yield f"its bits are {raw[:64].hex()}, those of the same values {again[:64].hex()}"
