"""What a driver reads of a fat binary: kernels, parameters, registers, static shared memory, launch bounds."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MAGIC = 0xBA55ED50
RESERVED = 1024  # bytes of shared memory that the driver has of every CTA, on sm_90 and newer
ELF_IMAGE = 2  # kind of image in a fat binary; 1 is PTX

# Attributes of `.nv.info` sections.
_MAX_THREADS, _PARAM_CBANK, _REQNTID, _FRAME = 0x05, 0x0A, 0x10, 0x11
_PARAM_INFO, _PARAM_BYTES, _REGISTERS, _CLUSTER = 0x17, 0x19, 0x2F, 0x3D


class Param(NamedTuple):
    """One parameter: its number, its offset in the parameter block and its size in bytes."""

    ordinal: int
    offset: int
    size: int


@dataclass
class Kernel:
    """A kernel of a cubin; a bound that the binary does not state is None.

    ``bank_offset`` is the address of the parameter block in the constant bank; ``frame`` is local memory in bytes.
    """

    name: str
    params: list[Param] = field(default_factory=list)
    param_bytes: int = 0
    bank_offset: int = 0
    registers: int = 0
    static_shared: int = 0
    frame: int = 0
    reqntid: tuple[int, ...] | None = None
    max_threads: tuple[int, ...] | None = None
    cluster: tuple[int, ...] | None = None


class Image(NamedTuple):
    """Machine code for one architecture, 90 for sm_90a; ``elf`` is the whole file, a cubin."""

    arch: int
    kernels: dict[str, Kernel]
    elf: bytes


def at(address: int) -> bytes:
    """Return the fat binary at an address, whose header tells its length."""
    magic, version, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != MAGIC or version != 1:
        raise ValueError(f"no fat binary: magic number {magic:#x}, version {version}")
    return ctypes.string_at(address, header + size)


def of_object(data: bytes) -> bytes:
    """Return the fat binary in the bytes of an object file or shared library."""
    start = data.index(struct.pack("<IH", MAGIC, 1))
    _, _, header, size = struct.unpack_from("<IHHQ", data, start)
    return data[start : start + header + size]


def digest(fatbin: bytes) -> str:
    """Return the name by which the PTX of a fat binary is kept."""
    return hashlib.sha256(fatbin).hexdigest()


def images(fatbin: bytes) -> list[Image]:
    """Return the machine code in a fat binary."""
    return [Image(arch, kernels(data), data) for kind, arch, data in _entries(fatbin) if kind == ELF_IMAGE]


def _entries(fatbin: bytes) -> Iterator[tuple[int, int, bytes]]:
    _, _, start, size = struct.unpack_from("<IHHQ", fatbin)
    end = start + size
    while start < end:
        kind, _, header, padded = struct.unpack_from("<HHIQ", fatbin, start)
        arch, unpacked = (
            struct.unpack_from("<I", fatbin, start + 28)[0],
            struct.unpack_from("<Q", fatbin, start + 56)[0],
        )
        if unpacked:
            raise ValueError("the fat binary has a compressed image")
        yield kind, arch, fatbin[start + header : start + header + padded]
        start += header + padded


def kernels(elf: bytes) -> dict[str, Kernel]:
    """Return the kernels of a cubin."""
    if elf[:4] != b"\x7fELF":
        raise ValueError("the image is no ELF file")
    table = struct.unpack_from("<Q", elf, 40)[0]
    entry, count, names_at = struct.unpack_from("<HHH", elf, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry) for i in range(count)]

    def text(section: int, offset: int) -> str:
        start = heads[section][4] + offset
        return elf[start : elf.index(b"\0", start)].decode()

    sections = {text(names_at, head[0]): head for head in heads}
    bodies = {name: b"" if head[1] == 8 else elf[head[4] : head[4] + head[5]] for name, head in sections.items()}
    found = {name[9:]: _kernel(name[9:], bodies[name]) for name in sections if name.startswith(".nv.info.")}
    for name, kernel in found.items():
        shared = sections.get(f".nv.shared.{name}")
        kernel.static_shared = max(0, shared[5] - RESERVED) if shared is not None else 0
    symbols = bodies.get(".symtab", b"")
    for attribute, value in _attributes(bodies.get(".nv.info", b"")):
        if attribute in (_FRAME, _REGISTERS):
            symbol, number = struct.unpack("<II", value)
            name = text(sections[".symtab"][6], struct.unpack_from("<I", symbols, 24 * symbol)[0])
            if name in found:
                setattr(found[name], "frame" if attribute == _FRAME else "registers", number)
    return found


def _kernel(name: str, info: bytes) -> Kernel:
    kernel = Kernel(name)
    for attribute, value in _attributes(info):
        if attribute == _PARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", value)
            kernel.params.append(Param(ordinal, offset, packed >> 18))
        elif attribute == _PARAM_BYTES:
            kernel.param_bytes = value
        elif attribute == _PARAM_CBANK:
            kernel.bank_offset = struct.unpack_from("<H", value, 4)[0]
        elif attribute == _REQNTID:
            kernel.reqntid = struct.unpack("<3I", value)
        elif attribute == _MAX_THREADS:
            kernel.max_threads = struct.unpack("<3I", value)
        elif attribute == _CLUSTER:
            kernel.cluster = struct.unpack("<3I", value)
    kernel.params.sort()
    return kernel


def _attributes(section: bytes) -> Iterator[tuple[int, bytes | int]]:
    offset = 0
    while offset < len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, offset)
        offset += 4
        if form == 4:
            value, offset = section[offset : offset + value], offset + value
        yield attribute, value
