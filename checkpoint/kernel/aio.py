"""Native asynchronous I/O (io_setup(2)): its structures, and what of a context no interface of its own tells.

A context is a ring of finished requests in the memory of the process, and a structure in the kernel.  Whether requests
are under way only that structure tells, in parts, one for each CPU: a BPF iterator over the one task reads it.  Nothing
is changed.

Source: fs/aio.c (struct kioctx, kioctx_table, aio_ring), include/uapi/linux/aio_abi.h.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from typing import Final

from checkpoint.kernel import taskiter
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.slotted import dataclass

__all__ = ["EVENT_SIZE", "IOCB", "IOCB_FD", "MOST", "RING", "RING_MAGIC", "Context", "contexts"]

_log = logging.getLogger(__name__)

#: struct aio_ring: id, nr, head, tail, magic, compat_features, incompat_features, header_length
RING: Final = struct.Struct("=8I")
RING_MAGIC: Final = 0xA10A10A1
#: struct io_event
EVENT_SIZE: Final = 32
#: struct iocb: data, key, rw_flags, opcode (0: a read), reqprio, fildes, buf, nbytes, offset, reserved, flags, resfd
IOCB: Final = struct.Struct("=QIIHhIQQqQII")
#: where in it the descriptor stands
IOCB_FD: Final = 20

#: contexts of one process that are told of
MOST: Final = 64
_POSSIBLE: Final = "/sys/devices/system/cpu/possible"
_WORD: Final = struct.Struct("=Q")
#: of each context, eight bytes each: address, size, limit, tail, done, room, cancellable; then one for each CPU
_WORDS: Final = 7
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Context:
    """One context, as the kernel sees it at this moment.

    number     its place in the table of the process
    address    of its ring, which is its ID
    nr         events that the ring holds
    limit      requests that io_setup was asked for
    tail       where in the ring the next event goes
    under_way  requests that have not finished
    waiting    whether some of these wait for a file to become ready (IOCB_CMD_POLL), perhaps for ever
    """

    number: int
    address: int
    nr: int
    limit: int
    tail: int
    under_way: int
    waiting: bool


def _possible_cpus() -> list[int]:
    with open(_POSSIBLE, encoding="ascii") as file:
        parts = [part.partition("-") for part in file.read().strip().split(",")]
    return [cpu for low, _, high in parts for cpu in range(int(low), int(high or low) + 1)]


def _write(asm: Asm, known: Layout, size: int) -> None:
    """What stands at the lower end of the frame goes to the reader."""
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -size).set(3, size).call(Helper.SEQ_WRITE)


def _offsets_program(known: Layout, percpu: int, cpus: list[int]) -> bytes:
    """Writes the address by which all CPUs know the map's only value, and the one that each of them has."""
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    # the map's own address as a number: a copy of where the verifier knows a pointer
    asm.map(1, percpu).store(8, FRAME, -24, 1).frame(1, -16).set(2, 8).frame(3, -24).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 3, FRAME, -16).add(3, known.offset("bpf_array", "pptrs")).frame(1, -8).set(2, 8)
    asm.call(Helper.PROBE_READ_KERNEL)
    _write(asm, known, 8)
    for cpu in cpus:
        asm.store_number(4, FRAME, -12, 0).map(1, percpu).frame(2, -12).set(3, cpu)
        asm.call(Helper.MAP_LOOKUP_PERCPU).jump_if(Jump.EQUAL, 0, 0, "out").store(8, FRAME, -8, 0)
        _write(asm, known, 8)
    return asm.label("out").exit(0).code()


def _offsets(known: Layout) -> list[int]:
    """What leads from an address that all CPUs have to that of each possible one."""
    cpus = _possible_cpus()
    percpu = call.create_map(call.MapType.PERCPU_ARRAY, 4, 8, 1, name="tcpmig_cpus")
    try:
        program = taskiter.load(known, _offsets_program(known, percpu, cpus), "tcpmig_cpus")
        try:
            data = taskiter.read(program, os.getpid())
        finally:
            os.close(program)
    finally:
        os.close(percpu)
    common, *each = (word for (word,) in _WORD.iter_unpack(data))
    if len(each) != len(cpus):
        raise BadBtf("a CPU has no memory of its own")
    return [(one - common) & _MASK for one in each]


def _program(known: Layout, offsets: list[int]) -> bytes:
    """Writes, of each context in the table, the words of _WORDS and the room that each CPU keeps for itself."""
    fields = [
        ("user_id", 8),
        ("nr_events", 4),
        ("max_reqs", 4),
        ("tail", 4),
        ("completed_events", 4),
        ("reqs_available", 4),
        ("active_reqs", 8),
    ]
    apart = known.offset("kioctx_cpu", "reqs_available")
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")

    def follow(to: int, base: int, offset: int, size: int = 8) -> None:
        asm.store_number(8, FRAME, -8, 0).frame(1, -8).set(2, size).mov(3, base).add(3, offset)
        asm.call(Helper.PROBE_READ_KERNEL).load(8, to, FRAME, -8)

    follow(8, 7, known.offset("task_struct", "mm"))
    asm.jump_if(Jump.EQUAL, 8, 0, "out")
    follow(8, 8, known.offset("mm_struct", "ioctx_table"))
    asm.jump_if(Jump.EQUAL, 8, 0, "out")
    follow(7, 8, known.offset("kioctx_table", "nr"), 4)
    _write(asm, known, 8)  # how many places the table has
    for number in range(MOST):
        # the end is too far away for a jump
        asm.jump_if(Jump.NOT_EQUAL, 7, number, f"place {number}").exit(0).label(f"place {number}")
        follow(9, 8, known.offset("kioctx_table", "table") + 8 * number)
        _write(asm, known, 8)  # where the context is; 0: nowhere
        asm.jump_if(Jump.EQUAL, 9, 0, f"after {number}")
        for name, size in fields:
            follow(1, 9, known.offset("kioctx", name), size)
            _write(asm, known, 8)
        for offset in offsets:
            follow(3, 9, known.offset("kioctx", "cpu"))
            asm.wide(1, offset).add_register(3, 1).add(3, apart)
            asm.store_number(8, FRAME, -8, 0).frame(1, -8).set(2, 4).call(Helper.PROBE_READ_KERNEL)
            _write(asm, known, 8)
        asm.label(f"after {number}")
    return asm.label("out").exit(0).code()


@dataclass(frozen=True, slots=True)
class _Reader:
    """The loaded program, how many CPUs it tells of, and where in a context the list of what can be cancelled lies."""

    program: int
    cpus: int
    active: int


@functools.cache
def _reader() -> _Reader | None:
    known = layout()
    try:
        offsets = _offsets(known)
        active = known.offset("kioctx", "active_reqs")
        program = taskiter.load(known, _program(known, offsets), "tcpmig_aio")
    except (OSError, BadBtf) as error:
        _log.info("asynchronous I/O contexts cannot be read: %s", error)
        return None
    known.save()
    return _Reader(program, len(offsets), active)


def contexts(tid: int) -> list[Context]:
    """The contexts of the process of this thread. KernelFeatureMissing where the kernel does not tell, or there are
    more than MOST places for them."""
    reader = _reader()
    if reader is None:
        raise KernelFeatureMissing("asynchronous I/O contexts cannot be read", object=f"pid {tid}")
    words = [word for (word,) in _WORD.iter_unpack(taskiter.read(reader.program, tid))]
    found: list[Context] = []
    if not words:
        return found
    places, at = words[0], 1
    for number in range(min(places, MOST)):
        where, at = words[at], at + 1
        if where:
            found.append(_context(number, where + reader.active, words[at : at + _WORDS + reader.cpus]))
            at += _WORDS + reader.cpus
    if places > MOST:
        raise KernelFeatureMissing(f"there are {places} places for asynchronous I/O contexts", object=f"pid {tid}")
    return found


def _context(number: int, active: int, words: list[int]) -> Context:
    address, nr, limit, tail, done, room, first, *apart = words
    # one place of the ring stays free; requests that finished and whose room nobody has asked for yet are done
    under_way = nr - 1 - _signed(room) - sum(apart) - done
    return Context(number, address, nr, limit, tail, under_way, first != active)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
