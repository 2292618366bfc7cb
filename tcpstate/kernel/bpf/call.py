"""bpf(2): maps, programs, links and iterators, as descriptors.

Source: include/uapi/linux/bpf.h, union bpf_attr; kernel/bpf/syscall.c.  Whatever is made here lasts as long as its
descriptor (or what uses it), and so does not outlive a tool that is killed; but for what is pinned.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

__all__ = [
    "Attach",
    "MapFlag",
    "MapType",
    "ProgramType",
    "Refused",
    "create_map",
    "delete",
    "iterate",
    "keys",
    "link",
    "load",
    "load_btf",
    "lookup",
    "map_memory",
    "open_tracepoint",
    "pin",
    "pinned",
    "run",
    "update",
    "update_all",
]

#: what a program says of its licence: the project's own
_LICENCE: Final = b"Apache-2.0"
#: or that these instructions are offered under the GPL as well (license_is_gpl_compatible): to others the kernel lends
#: neither its own functions nor struct_ops, nor the reading of its memory
_GPL_TOO: Final = b"Dual MIT/GPL"
_ATTR_SIZE: Final = 152
_LOG_SIZE: Final = 1 << 18
_NAME_SIZE: Final = 16
_READ_SIZE: Final = 1 << 20


class _Cmd(enum.IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    RAW_TRACEPOINT_OPEN = 17
    BTF_LOAD = 18
    MAP_UPDATE_BATCH = 26
    LINK_CREATE = 28
    ITER_CREATE = 33


class MapType(enum.IntEnum):
    """enum bpf_map_type"""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    STRUCT_OPS = 26


class MapFlag(enum.IntFlag):
    """Flags of BPF_MAP_CREATE."""

    MMAPABLE = 1 << 10
    LINK = 1 << 13  # a struct_ops map that is registered by a link (6.4)


class ProgramType(enum.IntEnum):
    """enum bpf_prog_type"""

    SOCKET_FILTER = 1
    SCHED_CLS = 3
    RAW_TRACEPOINT = 17
    TRACING = 26
    STRUCT_OPS = 27
    SYSCALL = 31


class Attach(enum.IntEnum):
    """enum bpf_attach_type"""

    NONE = 0
    TRACE_ITER = 28
    STRUCT_OPS = 44
    TCX_INGRESS = 46
    TCX_EGRESS = 47


#: BPF_F_SLEEPABLE
SLEEPABLE: Final = 1 << 4


class Refused(OSError):
    """bpf(2) refused; the message names the command, and ends with the verifier's last words if it had any."""


def _call(command: _Cmd, attr: bytes | bytearray, size: int = _ATTR_SIZE) -> int:
    buffer = ctypes.create_string_buffer(bytes(attr).ljust(size, b"\0"), size)
    try:
        return batch.syscall(SYS.bpf, command, ctypes.addressof(buffer), size)
    except OSError as error:
        raise Refused(error.errno, f"bpf {command.name}: {error.strerror}") from None


def _made(fd: int) -> int:
    os.set_inheritable(fd, False)
    return fd


def create_map(
    kind: MapType, key: int, value: int, entries: int, *, flags: int = 0, name: str = "tcpmig", btf: int = 0,
    structure: int = 0,
) -> int:  # fmt: skip
    """A map: sizes of key and value in bytes. ``btf``, ``structure``: for STRUCT_OPS, some BTF of ours and the id of
    the kernel's type of the value. Refused."""
    label = name.encode()[: _NAME_SIZE - 1]
    attr = struct.pack("=7I16s5I", kind, key, value, entries, flags, 0, 0, label, 0, btf, 0, 0, structure)
    return _made(_call(_Cmd.MAP_CREATE, attr))


def _element(command: _Cmd, fd: int, key: bytes, value: int) -> None:
    at = ctypes.create_string_buffer(key, len(key))
    _call(command, struct.pack("=IIQQQ", fd, 0, ctypes.addressof(at), value, 0), 32)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Set one element. Refused."""
    data = ctypes.create_string_buffer(value, len(value))
    _element(_Cmd.MAP_UPDATE_ELEM, fd, key, ctypes.addressof(data))


def update_all(fd: int, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
    """Set many elements of a hash map, all keys and all values of one size each. Refused. From 5.6."""
    if not keys:
        return
    joined = [b"".join(parts) for parts in (keys, values)]
    at = [ctypes.create_string_buffer(data, len(data)) for data in joined]
    attr = struct.pack("=QQQQIIQQ", 0, 0, *map(ctypes.addressof, at), len(keys), fd, 0, 0)
    _call(_Cmd.MAP_UPDATE_BATCH, attr, 56)


def lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """The value of an element, None if there is none. Refused."""
    data = ctypes.create_string_buffer(size)
    try:
        _element(_Cmd.MAP_LOOKUP_ELEM, fd, key, ctypes.addressof(data))
    except Refused as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return data.raw


def delete(fd: int, key: bytes) -> None:
    """Remove an element. Refused (ENOENT: there is none)."""
    _element(_Cmd.MAP_DELETE_ELEM, fd, key, 0)


def keys(fd: int, size: int) -> Iterator[bytes]:
    """The keys of a hash map, of ``size`` bytes each; begin anew if one is removed meanwhile that was not the last one
    given. Refused."""
    following = ctypes.create_string_buffer(size)
    key: bytes | None = None
    while True:
        at = ctypes.create_string_buffer(key, size) if key is not None else None
        attr = struct.pack("=IIQQ", fd, 0, 0 if at is None else ctypes.addressof(at), ctypes.addressof(following))
        try:
            _call(_Cmd.MAP_GET_NEXT_KEY, attr, 32)
        except Refused as error:
            if error.errno != errno.ENOENT:
                raise
            return
        key = following.raw
        yield key


def pin(fd: int, path: str) -> None:
    """Keep a map, program or link under this name in a bpffs; it ends when nothing has it open and the name is gone.
    Refused."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _call(_Cmd.OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0))


def pinned(path: str) -> int:
    """What was pinned under this name. Refused (ENOENT: nothing)."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _made(_call(_Cmd.OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0)))


def map_memory(fd: int, size: int) -> mmap.mmap:
    """The values of a MMAPABLE array map, as memory of ours. OSError."""
    return mmap.mmap(fd, size)


def load(
    kind: ProgramType,
    code: bytes,
    *,
    attach: Attach | int = 0,
    target: int = 0,
    flags: int = 0,
    name: str = "tcpmig",
    gpl: bool = False,
) -> int:
    """Load a program. Refused, with what the verifier said.

    attach  expected attach type; of a STRUCT_OPS program the index of the member that it is for
    target  BTF id of what it attaches to
    gpl     offered under the GPL as well, because the kernel refuses it otherwise
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(_GPL_TOO if gpl else _LICENCE)
    log = ctypes.create_string_buffer(0)

    def attr(level: int) -> bytes:
        size = ctypes.sizeof(log)
        log_at = ctypes.addressof(log) if level else 0
        head = struct.pack(
            "=IIQQIIQII16sII", kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence),
            level, size if level else 0, log_at, 0, flags, name.encode()[: _NAME_SIZE - 1], 0, int(attach),
        )  # fmt: skip
        # prog_btf_fd, func_info and line_info: none
        return head.ljust(108, b"\0") + struct.pack("=II", target, 0)

    try:
        return _made(_call(_Cmd.PROG_LOAD, attr(0)))
    except Refused as first:
        log = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return _made(_call(_Cmd.PROG_LOAD, attr(1)))
        except Refused:
            said = [line for line in log.value.decode("ascii", "replace").splitlines() if line]
            # the last line counts instructions; the reason stands before it
            reason = "; ".join(line for line in said[-4:] if not line.startswith("processed "))
            raise Refused(first.errno, f"program {name}: {first.strerror} {reason}".strip()) from None


def link(program: int, target: int, attach: Attach, *, info: bytes = b"") -> int:
    """Attach: ``target`` is an interface index (TCX_*), 0 (TRACE_ITER); ``program`` may be a struct_ops map; ``info``
    is a union bpf_iter_link_info: what an iterator walks. It lasts as long as the descriptor returned. Refused."""
    told = ctypes.create_string_buffer(info, len(info)) if info else None
    at = 0 if told is None else ctypes.addressof(told)
    return _made(_call(_Cmd.LINK_CREATE, struct.pack("=IIIIQI", program, target, attach, 0, at, len(info))))


def open_tracepoint(program: int, name: str) -> int:
    """Run a RAW_TRACEPOINT program at each event of that name, in all processes, as long as the descriptor returned is
    there. Refused."""
    label = ctypes.create_string_buffer(name.encode())
    return _made(_call(_Cmd.RAW_TRACEPOINT_OPEN, struct.pack("=QI4x", ctypes.addressof(label), program)))


def iterate(link_fd: int, again: Callable[[bytes, bytes], bool] | None = None) -> bytes:
    """All that an iterator's program writes, in the calling thread's network namespace. OSError.

    again  whether of two parts, one read after the other, the second tells once more what was told: where an iterator
           does not come to its end by itself
    """
    fd = _made(_call(_Cmd.ITER_CREATE, struct.pack("=II", link_fd, 0)))
    try:
        parts: list[bytes] = []
        while part := os.read(fd, _READ_SIZE):
            if again is not None and parts and again(parts[-1], part):
                break
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def run(program: int, context: bytes) -> int:
    """Run a SYSCALL program once with this context; what it returned. Refused."""
    at = ctypes.create_string_buffer(context, len(context))
    attr = bytearray(struct.pack("=IIIIQQIIIIQQIII", program, *[0] * 3, 0, 0, 0, 0, len(context), 0,
                                 ctypes.addressof(at), 0, 0, 0, 0))  # fmt: skip
    buffer = ctypes.create_string_buffer(bytes(attr), len(attr))
    try:
        batch.syscall(SYS.bpf, _Cmd.PROG_TEST_RUN, ctypes.addressof(buffer), len(attr))
    except OSError as error:
        raise Refused(error.errno, f"bpf PROG_TEST_RUN: {error.strerror}") from None
    value: int = struct.unpack_from("=I", buffer.raw, 4)[0]
    return value


def load_btf(data: bytes) -> int:
    """BTF of our own. Refused."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return _made(_call(_Cmd.BTF_LOAD, struct.pack("=QQIII", ctypes.addressof(buffer), 0, len(data), 0, 0), 28))
