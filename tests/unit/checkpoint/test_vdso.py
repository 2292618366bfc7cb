"""Another kernel's vdso: its functions found, and led to this kernel's. The vdso is that of this kernel."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import signal
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.arch import USER_END, Frame, signal_frames, vdso_call, vdso_jump
from checkpoint.errors import AddressGapMissing, OtherVdso
from checkpoint.memory import vdso
from checkpoint.memory.vma import PAGE, VDSO, Vma, read_maps
from tcpstate.kernel.batch import libc

BASE = 0x7000_0000_0000


@functools.cache
def own() -> tuple[int, bytes]:
    """Where ours is, and its code."""
    vma = next(vma for vma in read_maps(os.getpid()) if vma.name == VDSO)
    return vma.start, vdso.code(ctypes.string_at(vma.start, vma.size))


def run(code: bytes, *args: int) -> int:
    """The code called as a function of our own process."""
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    function = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_ulong] * 5)(address)
    result: int = function(*args, *[0] * (5 - len(args)))
    return result


def clock(code: bytes) -> float:
    """CLOCK_MONOTONIC by code that does as clock_gettime."""
    room = (ctypes.c_long * 2)()
    assert run(code, time.CLOCK_MONOTONIC, ctypes.addressof(room)) == 0
    return room[0] + room[1] / 1e9


def test_its_functions_are_found() -> None:
    start, code = own()
    offset, size = vdso.functions(code)["__vdso_clock_gettime"]
    assert size > 14
    before = time.monotonic()
    assert before <= clock(vdso_jump(start + offset)) <= time.monotonic()


def test_each_function_leads_to_the_same_one_there() -> None:
    _, code = own()
    out = vdso.proxied(code, code, BASE)
    assert len(out) == len(code)
    for offset, _ in vdso.functions(code).values():
        jump = vdso_jump(BASE + offset)
        assert out[offset : offset + len(jump)] == jump
    assert sum(a != b for a, b in zip(out, code, strict=True)) <= 14 * len(vdso.functions(code))


def test_a_function_that_is_missing_there_makes_the_call() -> None:
    _, code = own()
    other = code.replace(b"_clock_gettime\0", b"_clock_xettime\0").replace(b"\0clock_gettime\0", b"\0clock_xettime\0")
    out = vdso.proxied(code, other, BASE)
    offset, _ = vdso.functions(code)["__vdso_clock_gettime"]
    call = vdso_call("clock_gettime")
    assert out[offset : offset + len(call)] == call


def test_what_makes_the_call_does_as_the_function() -> None:
    before = time.monotonic()
    assert before <= clock(vdso_call("__vdso_clock_gettime")) <= time.monotonic()
    room = ctypes.create_string_buffer(16)
    assert run(vdso_call("getrandom"), ctypes.addressof(room), 16, 0, 0, 0) == 16
    assert room.raw != bytes(16)


def test_what_no_call_can_do_is_answered() -> None:
    # asked what state it wants, getrandom's function must not say that it wants none
    assert run(vdso_call("getrandom"), 0, 0, 0, 0, (1 << 64) - 1) == -errno.ENOSYS
    assert run(vdso_call("__vdso_sgx_enter_enclave")) == -errno.ENOSYS


def test_a_function_without_room_for_a_jump_is_refused() -> None:
    _, code = own()
    offset, size = vdso.functions(code)["__vdso_getcpu"]
    entry = struct.pack("<QQ", offset, size)
    assert code.count(entry) >= 1
    with pytest.raises(OtherVdso, match="13 bytes, too few"):
        vdso.proxied(code.replace(entry, struct.pack("<QQ", offset, 13)), code, BASE)
    beyond = code.replace(entry, struct.pack("<QQ", len(code) - 5, size))
    with pytest.raises(OtherVdso):
        vdso.proxied(beyond, code, BASE)


@given(st.integers(0, 4096), st.binary(min_size=1, max_size=8))
def test_a_damaged_one_is_refused_or_harmless(at: int, put: bytes) -> None:
    _, code = own()
    damaged = code[:at] + put + code[at + len(put) :]
    try:
        out = vdso.proxied(vdso.code(damaged), code, BASE)
    except OtherVdso:
        return
    assert len(out) == len(vdso.code(damaged))


def test_the_place_is_in_the_middle_of_the_largest_gap() -> None:
    special = [Vma(0x1000, 0x5000, 1, False, 0, 0, 0, "[vvar]"), Vma(0x5000, 0x7000, 5, False, 0, 0, 0, VDSO)]
    taken = [(0x2000_0000, 0x3000_0000), (0x7000_0000_0000, 0x7000_0001_0000)]
    place = vdso.free_place(taken, special)
    assert place % PAGE == 0
    assert place == pytest.approx((0x3000_0000 + 0x7000_0000_0000) // 2, abs=0x10000)
    with pytest.raises(AddressGapMissing):
        vdso.free_place([(0, USER_END)], special)


def test_frames_of_handlers_are_found_on_a_stack() -> None:
    found: list[Frame] = []

    def handler(_: int) -> None:
        vma = next(vma for vma in read_maps(os.getpid()) if vma.name == "[stack]")
        found.extend(signal_frames(ctypes.string_at(vma.start, vma.size), vma.start))

    # a handler in C, for those of Python run when their signal's frame is gone
    function = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = install(signal.SIGUSR2, ctypes.cast(function, ctypes.c_void_p))
    try:
        signal.raise_signal(signal.SIGUSR2)
    finally:
        install(signal.SIGUSR2, before)
    maps = read_maps(os.getpid())
    assert found
    assert any(
        any(vma.start <= frame.ip < vma.end and vma.prot & 4 for vma in maps)
        and any(vma.start <= frame.sp < vma.end and vma.name == "[stack]" for vma in maps)
        for frame in found
    )


def test_words_that_are_no_frame_are_not() -> None:
    mark = (0x46505853).to_bytes(4, "little")
    for stack in (b"", mark, bytes(500) + mark, bytes(464) + mark, bytes(2000) + mark + bytes(9)):
        assert signal_frames(stack, 0x7000) == []


def test_an_address_left_on_the_stack_hides_no_frame() -> None:
    start, area, size = 0x7000_0000, 2048, 2048
    stack = bytearray(area + size + 4)
    stack[area + 464 : area + 488] = struct.pack("<IIQI4x", 0x46505853, size + 4, 7, size)
    address = struct.pack("<Q", start + area)
    context = 1200  # r8 to rcx, then sp, ip, flags, cs; the registers' address is the last of 192 bytes
    stack[context + 120 : context + 136] = struct.pack("<QQ", 0x1234, 0x5678)
    stack[context + 144 : context + 146] = struct.pack("<H", 0x33)
    stack[context + 184 : context + 192] = address
    plain = signal_frames(bytes(stack), start)
    assert plain == [Frame(0x5678, 0x1234, start + area, size + 4)]
    for at in (area - 8, area - 23, area - 300):
        stray = bytearray(stack)
        stray[at : at + 8] = address
        assert signal_frames(bytes(stray), start) == plain
