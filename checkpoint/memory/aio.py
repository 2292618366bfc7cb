"""Rings of native asynchronous I/O contexts (io_setup(2)): what has finished and was not fetched yet.

The ID of a context is the address of its ring, and its number stands in the ring; a rebuilt one gets both, and goes on
at the same place of the ring: requests that do nothing bring it there, and what they leave is overwritten.

Requests that are under way cannot be moved.  Transfers end while the process stands still: they are waited for.

Source: fs/aio.c (aio_setup_ring, aio_ring_mremap: a ring may be moved and its context goes along; aio_complete).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint.arch import USER_END
from checkpoint.errors import AioNotMade, AioRing, AioUnderWay
from checkpoint.kernel import aio
from checkpoint.kernel.mman import Map, Prot, Remap
from checkpoint.memory.vma import PAGE, Vma
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.calls import CallError, CallTable, Data
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub
    from checkpoint.tracee import Process

__all__ = ["Ring", "apart", "capture", "examine", "rebuild", "require_apart"]

_NAME: Final = "/[aio]"
#: seconds that the stop waits for requests, and the check for a moment without any that waits for a file
_PATIENCE: Final = 0.2
_LOOK_AGAIN: Final = 0.002
#: requests in one call
_AT_ONCE: Final = 512
#: a ring is not longer: 0x10000000 bytes of events (fs/aio.c, ioctx_alloc)
_SIZE_MAX: Final = 0x10000000 + PAGE
_U32: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """One context.

    start, end  addresses of its ring
    number      its place in the table of the process
    limit       requests that io_setup was asked for
    content     the ring's bytes, without the zeros at the end
    """

    start: int
    end: int
    number: int
    limit: int
    content: bytes

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end <= USER_END or (self.start | self.end) % PAGE or self.size > _SIZE_MAX:
            raise ValueError(f"a ring cannot be at {self.start:#x}-{self.end:#x}")
        if not 0 <= self.number < aio.MOST or not 0 < self.limit <= _U32:
            raise ValueError(f"a context cannot have the number {self.number} and {self.limit} requests")
        if not aio.RING.size <= len(self.content) <= self.size:
            raise ValueError(f"a ring of {self.size} bytes cannot have a content of {len(self.content)}")
        number, nr, head, tail, magic, *_ = self._head
        if (number, magic) != (self.number, aio.RING_MAGIC) or nr != self.events or head >= nr or tail >= nr:
            raise ValueError(f"the ring at {self.start:#x} has a head that does not fit it")

    @property
    def _head(self) -> tuple[int, ...]:
        return aio.RING.unpack_from(self.content)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def events(self) -> int:
        """How many fit."""
        return (self.size - aio.RING.size) // aio.EVENT_SIZE

    @property
    def tail(self) -> int:
        """Where the next event goes."""
        return self._head[3]

    @property
    def unread(self) -> int:
        """Events that nobody has fetched."""
        return (self.tail - self._head[2]) % self.events

    def __str__(self) -> str:
        return f"ring {self.start:x}-{self.end:x}"


def _is_ring(vma: Vma) -> bool:
    """Whether it is the ring of a context."""
    return vma.name.startswith(_NAME)


def apart(vmas: Sequence[Vma]) -> tuple[Sequence[Vma], Sequence[Vma]]:
    """(rings, all the others)."""
    rings = [vma for vma in vmas if _is_ring(vma)]
    return rings, [vma for vma in vmas if not _is_ring(vma)] if rings else vmas


def require_apart(rings: Sequence[Ring], areas: Iterable[tuple[int, int]]) -> None:
    """ValueError unless these are a process's contexts; ``areas``: (start, end) of all that it has in its memory."""
    if not rings:
        return
    if any(start < end for (_, end), (start, _) in itertools.pairwise(sorted(areas))):
        raise ValueError("the ring of a context overlaps something")
    if len({ring.number for ring in rings}) != len(rings):
        raise ValueError("two contexts have the same number")


def _contexts(pid: int, vmas: Sequence[Vma]) -> list[aio.Context]:
    """Those of a process, if these are their rings, whole. AioRing."""
    try:
        found = aio.contexts(pid)
    except KernelFeatureMissing as error:
        raise AioRing(error.message, object=f"pid {pid}") from error
    rings = {vma.start: vma for vma in vmas}
    for context in found:
        vma = rings.pop(context.address, None)
        size = aio.RING.size + context.nr * aio.EVENT_SIZE
        if vma is None or vma.size != size + -size % PAGE or vma.prot != Prot.READ | Prot.WRITE:
            text = "the ring of an asynchronous I/O context is not mapped as the kernel made it"
            raise AioRing(text, object=f"pid {pid} map {context.address:x}")
    for vma in rings.values():
        text = "the ring of another process's asynchronous I/O context"
        raise AioRing(text, object=f"pid {pid} map {vma.start:x}-{vma.end:x}")
    return found


def examine(pid: int, vmas: Sequence[Vma]) -> None:
    """Before the stop: AioRing, or AioUnderWay if requests wait that may wait for ever."""
    rings = [vma for vma in vmas if _is_ring(vma)]
    deadline = time.monotonic() + _PATIENCE
    while rings and (waiting := [context for context in _contexts(pid, rings) if context.waiting]):
        if time.monotonic() > deadline:
            text = "requests of an asynchronous I/O context wait for files to become ready"
            raise AioUnderWay(text, object=f"pid {pid} map {waiting[0].address:x}")
        time.sleep(_LOOK_AGAIN)


def capture(process: Process, vmas: Sequence[Vma]) -> tuple[Ring, ...]:
    """The contexts whose rings these are, of a stopped process. AioRing, AioUnderWay."""
    if not vmas:
        return ()
    deadline = time.monotonic() + _PATIENCE
    while busy := [context for context in _contexts(process.pid, vmas) if context.under_way]:
        if time.monotonic() > deadline:
            text = f"{busy[0].under_way} requests of an asynchronous I/O context are under way"
            raise AioUnderWay(text, object=f"pid {process.pid} map {busy[0].address:x}")
        time.sleep(_LOOK_AGAIN)
    ends = {vma.start: vma.end for vma in vmas}
    found = []
    for context in _contexts(process.pid, vmas):
        start, end = context.address, ends[context.address]
        content = process.read(start, end - start).rstrip(b"\0").ljust(aio.RING.size, b"\0")
        try:
            ring = Ring(start=start, end=end, number=context.number, limit=context.limit, content=content)
        except ValueError as error:
            raise AioRing(str(error), object=f"pid {process.pid} map {start:x}-{end:x}") from error
        if ring.tail != context.tail:
            # the process has written into the kernel's part of it
            raise AioRing("its ring does not say where the next event goes", object=f"pid {process.pid} map {start:x}")
        found.append(ring)
    return tuple(found)


def rebuild(rings: Sequence[Ring], stub: Stub) -> None:
    """Make the contexts in a stub whose other memory is laid out. AioNotMade."""
    if not rings:
        return
    try:
        _rebuild({ring.number: ring for ring in rings}, stub)
    except CallError as error:
        raise AioNotMade(str(error.strerror), object=f"pid {stub.pid}") from error


def _rebuild(rings: dict[int, Ring], stub: Stub) -> None:
    calls = CallTable()
    for ring in rings.values():
        # nothing that the kernel places may lie there
        flags = Map.PRIVATE | Map.ANONYMOUS | Map.NORESERVE | Map.FIXED_NOREPLACE
        calls.call(SYS.mmap, ring.start, ring.size, 0, flags, -1, 0, label=f"a place for the {ring}")
    made: dict[int, Data] = {}
    for number in range(max(rings) + 1):
        # a context gets the first number that is free: those of contexts that are no more are taken for now
        made[number] = calls.room(8)
        limit = rings[number].limit if number in rings else 1
        calls.call(SYS.io_setup, limit, made[number], label=f"context {number} of {limit} requests")
    stub.run(calls)
    calls = CallTable()
    for number, where in made.items():
        if number in rings:
            ring, at = rings[number], where.u64()
            _require_size(stub, ring, at)
            how = Remap.MAYMOVE | Remap.FIXED
            calls.call(SYS.mremap, at, ring.size, ring.size, how, ring.start, label=f"moving the {ring}")
        else:
            calls.call(SYS.io_destroy, where.u64(), label=f"removing the context {number}")
    stub.run(calls)
    stub.forget_maps()
    before = os.sched_getaffinity(stub.pid)
    # each CPU keeps some room of a context for itself: one alone gets at all that a ring can hold
    os.sched_setaffinity(stub.pid, {min(before)})
    try:
        for ring in rings.values():
            _bring_forward(stub, ring)
            stub.write(ring.start, ring.content)
    finally:
        os.sched_setaffinity(stub.pid, before)


def _require_size(stub: Stub, ring: Ring, at: int) -> None:
    nr = aio.RING.unpack(stub.read(at, aio.RING.size))[1]
    if nr != ring.events:
        raise AioNotMade(f"the {ring} had room for {ring.events} events, here it has {nr}", object=f"pid {stub.pid}")


def _bring_forward(stub: Stub, ring: Ring) -> None:
    """So many requests that the tail is where it was, of which as many stay unread as there were: then the kernel knows
    how much room is left."""
    unread = ring.unread
    total = ring.tail if ring.tail >= unread else ring.tail + ring.events
    if not total:
        return
    calls = CallTable()
    request = calls.put(aio.IOCB.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    several = calls.room(8 * min(total, _AT_ONCE))
    for at in range(0, several.size, 8):
        calls.pointer(several + at, request)
    events = calls.room(aio.EVENT_SIZE * min(total, _AT_ONCE))
    fd = calls.call(SYS.openat, -1, calls.path("/dev/null"), 0, 0, out=request + aio.IOCB_FD, label="/dev/null")
    submitted = []
    left = total
    while left:
        fetched = min(left - unread, _AT_ONCE, ring.events - 1)
        count = fetched or min(left, _AT_ONCE)
        submitted.append(
            (calls.call(SYS.io_submit, ring.start, count, several, label=f"requests for the {ring}"), count)
        )
        if fetched:
            calls.call(SYS.io_getevents, ring.start, count, count, events, 0, label=f"events of the {ring}")
        else:
            unread -= count
        left -= count
    calls.call(SYS.close, fd, label="closing /dev/null")
    stub.run(calls)
    if any(done.value != count for done, count in submitted):
        raise AioNotMade(f"the {ring} took fewer requests than it has room for", object=f"pid {stub.pid}")
