"""The kernel's own mappings (vdso and its data) in a stub: kept, moved to where the original had them, or, if they are
another kernel's, put aside for the old code to lead to (:mod:`checkpoint.memory.vdso`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint.errors import OtherVdso
from checkpoint.kernel.mman import Map, Prot, Remap
from checkpoint.memory import vdso
from checkpoint.memory.vma import VDSO, VSYSCALL, Vma, find_named
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

if TYPE_CHECKING:
    from checkpoint.memory.layout import MemoryLayout
    from checkpoint.spawn import Stub

__all__ = ["clear", "is_foreign", "lead_on", "leads_on"]


def clear(layout: MemoryLayout, stub: Stub, calls: CallTable) -> None:
    """Queue: unmap all that the stub was born with, bring the kernel's own mappings to their places. OtherVdso,
    AddressGapMissing."""
    low, high = stub.window
    # In the window too: the page of the stub's program. As long as it is mapped, the exe link stays (EBUSY).
    mine = [vma for vma in stub.maps if vma.name != VSYSCALL and not (low <= vma.start < high and vma.anonymous)]
    kept, places = _places(layout, stub)
    park, parked = stub.parking[0], []
    for vma in kept:
        if park + vma.size > stub.parking[1]:
            raise OtherVdso(f"{vma.name} of {vma.size} bytes is larger than was thought", object=f"pid {layout.pid}")
        _move(calls, vma.start, vma.size, park, f"park {vma.name}")
        parked.append(park)
        park += vma.size
    for vma in mine:
        # what was parked leaves nothing behind; unmapping nothing is no error
        calls.call(SYS.munmap, vma.start, vma.size, label=f"munmap {vma}")
    for vma, aside, place in zip(kept, parked, places, strict=True):
        _move(calls, aside, vma.size, place, f"place {vma.name}")
    if kept and is_foreign(layout, stub):
        old = next(mapping for mapping in layout.mappings if mapping.name == VDSO)
        flags = Map.PRIVATE | Map.ANONYMOUS | Map.FIXED_NOREPLACE
        calls.call(SYS.mmap, old.start, old.size, Prot.READ | Prot.EXEC, flags, -1, 0, label="the old vdso")


def _places(layout: MemoryLayout, stub: Stub) -> tuple[list[Vma], list[int]]:
    """Which of the stub's mappings are kept, and where each will lie."""
    here = sorted(vma for vma in stub.maps if vma.special)
    wanted = {mapping.name: mapping.start for mapping in layout.mappings if mapping.special}
    if VDSO not in wanted or not is_foreign(layout, stub):
        kept = [vma for vma in here if vma.name in wanted]
        return kept, [wanted[vma.name] for vma in kept]
    # the code finds its data by their distance
    taken = [(mapping.start, mapping.end) for mapping in layout.mappings]
    base = vdso.free_place(sorted([*taken, stub.window]), here)
    return here, [base + vma.start - here[0].start for vma in here]


def is_foreign(layout: MemoryLayout, stub: Stub) -> bool:
    """Whether the layout's vdso is another than that of this kernel, which the stub has. OtherVdso if it cannot be told
    what it is."""
    wanted = {mapping.name: mapping.size for mapping in layout.mappings if mapping.special}
    here = {vma.name: vma.size for vma in stub.maps if vma.special}
    if not wanted:
        return False
    if VDSO not in wanted or VDSO not in here:
        raise OtherVdso("a process without a vdso, but with its data, cannot be", object=f"pid {layout.pid}")
    return wanted != here or _code(stub) != layout.vdso


def _code(stub: Stub) -> bytes:
    vma = next(vma for vma in stub.maps if vma.name == VDSO)
    return vdso.code(stub.read(vma.start, vma.size))


def lead_on(layout: MemoryLayout, stub: Stub) -> None:
    """After the table of :func:`clear` has run: the old vdso's functions lead to this kernel's. OtherVdso."""
    old = leads_on(layout, stub)
    if old is not None:
        start, end = old
        stub.forget_maps()
        base = next(vma.start for vma in stub.maps if vma.name == VDSO)
        if len(layout.vdso) > end - start:
            raise OtherVdso("the code of the vdso is larger than its mapping", object=f"pid {layout.pid}")
        stub.write(start, vdso.proxied(layout.vdso, _code(stub), base))


def leads_on(layout: MemoryLayout, stub: Stub) -> tuple[int, int] | None:
    """(start, end) of code of another kernel's vdso in a stub that has this layout; None if there is none."""
    old = next((mapping for mapping in layout.mappings if mapping.name == VDSO), None)
    new = find_named(stub.pid, VDSO)
    if old is None or new is None or new.start == old.start:
        return None
    return old.start, old.end


def _move(calls: CallTable, start: int, size: int, to: int, label: str) -> None:
    calls.call(SYS.mremap, start, size, size, Remap.MAYMOVE | Remap.FIXED, to, label=label)
