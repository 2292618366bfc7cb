"""What a stub's memory lets itself be done: one assumption of the layout's rebuild per test."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from checkpoint.kernel.mman import MM_MAP, MM_MAP_EXE_FD, Map, PrSetMm, Remap
from checkpoint.memory.vma import Vma, read_maps, read_smaps
from checkpoint.procfs import read_stat
from checkpoint.spawn import Stub, spawn_stub
from tcpstate.kernel.calls import CallError, CallTable, Data
from tcpstate.kernel.machine import SYS

PLACE = 1 << 44


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = spawn_stub(None, [])
    try:
        yield made
    finally:
        made.kill()
        made.close()


def special(stub: Stub) -> list[Vma]:
    return [vma for vma in read_maps(stub.pid) if vma.special]


def failure(stub: Stub, calls: CallTable) -> int | None:
    with pytest.raises(CallError) as caught:
        stub.run(calls)
    return caught.value.errno


def mm_map(stub: Stub, calls: CallTable, exe: int) -> Data:
    """A struct prctl_mm_map as the stub's memory is, with the program ``exe``."""
    stat = read_stat(stub.pid)
    words = [stat.start_code, stat.end_code, *[PLACE] * 4, stat.start_stack, *[PLACE] * 4]
    fields = calls.put(MM_MAP.pack(*words, 0, 0, 0) + bytes(4))
    calls.call(SYS.pidfd_getfd, stub.tool_pidfd, exe, 0, out=fields + MM_MAP_EXE_FD)
    return fields


def test_the_vdso_and_its_data_can_be_moved(stub: Stub) -> None:
    before, calls, at = special(stub), CallTable(), PLACE
    assert {vma.name for vma in before} >= {"[vdso]", "[vvar]"}
    for vma in before:
        calls.call(SYS.mremap, vma.start, vma.size, vma.size, Remap.MAYMOVE | Remap.FIXED, at)
        at += vma.size
    stub.run(calls)
    assert [(vma.name, vma.size) for vma in special(stub)] == [(vma.name, vma.size) for vma in before]
    assert special(stub)[0].start == PLACE


def test_a_mapping_is_not_made_over_another(stub: Stub) -> None:
    calls, there = CallTable(), special(stub)[0]
    flags = Map.PRIVATE | Map.ANONYMOUS | Map.FIXED_NOREPLACE
    calls.call(SYS.mmap, there.start, 4096, 3, flags, -1, 0)
    assert failure(stub, calls) == errno.EEXIST


def test_a_mapping_that_grows_down_is_no_larger_than_asked_for(stub: Stub) -> None:
    calls = CallTable()
    flags = Map.PRIVATE | Map.ANONYMOUS | Map.FIXED_NOREPLACE | Map.GROWSDOWN
    calls.call(SYS.mmap, PLACE, 16 * 4096, 3, flags, -1, 0)
    stub.run(calls)
    made = next(vma for vma in read_smaps(stub.pid) if vma.start == PLACE)
    assert made.size == 16 * 4096
    assert "gd" in made.flags


def test_the_exe_link_cannot_be_changed_while_the_program_is_mapped(stub: Stub) -> None:
    exe = os.open("/bin/true", os.O_RDONLY)
    try:
        calls = CallTable()
        fields = mm_map(stub, calls, exe)
        calls.call(SYS.prctl, PrSetMm.OPTION, PrSetMm.MAP, fields, MM_MAP.size, 0)
        assert failure(stub, calls) == errno.EBUSY
    finally:
        os.close(exe)


def test_the_exe_link_can_be_changed_once_the_program_is_unmapped(stub: Stub) -> None:
    exe = os.open("/bin/true", os.O_RDONLY)
    try:
        calls = CallTable()
        for vma in read_maps(stub.pid):
            if not vma.anonymous:
                calls.call(SYS.munmap, vma.start, vma.size)
        fields = mm_map(stub, calls, exe)
        calls.call(SYS.prctl, PrSetMm.OPTION, PrSetMm.MAP, fields, MM_MAP.size, 0)
        stub.run(calls)
    finally:
        os.close(exe)
    assert os.readlink(f"/proc/{stub.pid}/exe") == os.path.realpath("/bin/true")
    assert read_stat(stub.pid).arg_start == PLACE
