"""Calls that wait for a time and of which the kernel keeps no note: which they are, how they go on, and whether their
register may be changed."""

from __future__ import annotations

import dataclasses
import errno
import struct

import pytest

from checkpoint.arch.x86_64 import waits
from checkpoint.arch.x86_64.liveness import unused
from checkpoint.arch.x86_64.registers import Registers, Restart
from checkpoint.kernel.callwatch import Places, timer_on
from tcpstate.kernel.machine import SYS

M = (1 << 64) - 1
RDX, R8, R10 = 2, 8, 10


def stopped_in(number, result=Restart.NOHAND, **arguments):
    return dataclasses.replace(Registers(*[0] * 27), orig_rax=number, rax=result & M, rip=0x1000, **arguments)


@pytest.mark.parametrize(
    ("number", "arguments", "register", "longest"),
    [
        (SYS.epoll_wait, {"r10": 250}, "r10", 250_000_000),
        (SYS.epoll_pwait, {"r10": 0xFFFFFFFF00000001}, "r10", 1_000_000),  # an int
        (SYS.epoll_pwait2, {"r10": 0x5000}, "r10", None),
        (SYS.rt_sigtimedwait, {"rdx": 0x5000}, "rdx", None),
        (SYS.semtimedop, {"r10": 0x5000}, "r10", None),
        (SYS.io_getevents, {"r8": 0x5000}, "r8", None),
    ],
)
def test_waits_for_a_time_are_known(number, arguments, register, longest):
    found = waits.wait_of(stopped_in(number, **arguments))
    assert found == waits.Wait(int(number), register, longest)


@pytest.mark.parametrize(
    ("number", "result", "arguments"),
    [
        (SYS.epoll_wait, Restart.NOHAND, {"r10": 0xFFFFFFFF}),  # for ever
        (SYS.epoll_wait, Restart.NOHAND, {"r10": 0}),  # not at all
        (SYS.epoll_pwait2, Restart.NOHAND, {}),
        (SYS.rt_sigtimedwait, Restart.NOHAND, {}),
        (SYS.epoll_wait, 1, {"r10": 250}),  # it has what it waited for
        (SYS.epoll_wait, -errno.EINTR, {"r10": 250}),  # a handler has run
        (SYS.read, Restart.NOHAND, {"r10": 250}),
        (M, Restart.NOHAND, {"r10": 250}),
    ],
)
def test_others_are_not(number, result, arguments):
    assert waits.wait_of(stopped_in(number, result, **arguments)) is None


def test_a_wait_goes_on_with_what_was_left_and_never_less():
    registers = stopped_in(SYS.epoll_wait, r10=5000)
    again, place, data = waits.wait_of(registers).begun(registers, 1_000_001)
    assert (again, place, data) == (dataclasses.replace(registers, r10=2), 0, b"")
    again, _, _ = waits.wait_of(registers).begun(registers, 1 << 62)
    assert again.r10 == (1 << 31) - 1
    # the time as a number in a call that is the same but for that
    registers = stopped_in(SYS.epoll_pwait2, r10=0x5000, r8=7)
    again, place, data = waits.wait_of(registers).begun(registers, 3_000_000)
    assert (again, place, data) == (dataclasses.replace(registers, orig_rax=SYS.epoll_pwait, r10=3), 0, b"")


def test_a_time_in_memory_lies_beyond_the_red_zone():
    registers = stopped_in(SYS.rt_sigtimedwait, rdx=0x5000, rsp=0x7008)
    again, place, data = waits.wait_of(registers).begun(registers, 2_000_000_001)
    assert again == dataclasses.replace(registers, rdx=place)
    assert place + 16 <= 0x7008 - 128 < place + 40
    assert place % 16 == 0
    assert data == struct.pack("<qq", 2, 1)


def code(text, *, at=0x1000):
    data = bytes.fromhex(text.replace(" ", ""))

    def read(address, size):
        if not at <= address < at + len(data):
            raise OSError(errno.EIO, "nothing is there")
        return data[address - at : address - at + size]

    return read


@pytest.mark.parametrize("register", [RDX, R8, R10])
@pytest.mark.parametrize(
    "text",
    [
        "c3",
        "483d00f0ffff 7701 c3 488b1581 9e0c00 f7d8 648902 b8ffffffff c3",  # glibc: cmp, ja, ret; errno by rdx
        "89442420 c3",  # Go: the result, to the stack
        "e800000000 c3",  # a function that only returns
        "48c7c2 01000000 41b8 01000000 4d31d2 eb00 9090 c3",
        "488b15 00000000 4c8b0424 4c8d1424 c3",
        "5a 4158 415a c3",
        "f30f1efa 0f1f4000 0f0b",
        "90 ebfd",  # for ever
    ],
)
def test_a_register_that_is_overwritten_or_left_behind_is_unused(register, text):
    assert unused(code(text), 0x1000, register)


@pytest.mark.parametrize(
    ("register", "text"),
    [
        (R10, "4c89d0 c3"),  # mov %r10, %rax
        (R10, "483d00f0ffff 7701 c3 4c89d0 c3"),  # on one path only
        (R10, "e801000000 c3 4c89d0 c3"),  # in a function that is called
        (R10, "e806000000 4c89d0 c3 9090 c3 c3"),  # after it
        (R10, "498b02 c3"),  # mov (%r10), %rax
        (R10, "4b8b0411 c3"),  # as an index: mov (%r9,%r10), %rax
        (R10, "4152 c3"),  # push
        (R10, "41b201 4c89d0 c3"),  # only its lowest byte is overwritten
        (R10, "6641ba0100 c3"),  # only 16 bits
        (R10, "4d0f44d0 c3"),  # overwritten if
        (R10, "0f05 c3"),  # another call
        (R10, "ffe0"),  # a jump to who knows where
        (R10, "ff10 c3"),
        (R10, "90"),  # and then nothing is there
        (R10, "0f38 c3"),  # not understood
        (R10, "3e"),
        (RDX, "f7e1 c3"),  # mul
        (RDX, "99 c3"),
        (RDX, "88f0 c3"),  # mov %dh, %al
        (RDX, "8902 c3"),
        (RDX, "0fb6c2 c3"),
        (RDX, "488d0c95 00000000 c3"),  # lea 0(,%rdx,4), %rcx
        (R8, "4589c1 c3"),
        (R8, "4983c001 c3"),
        (R8, "f0450fb101 c3"),
        (R8, "90" * 300 + "c3"),  # too long a way
        (RDX, "483b1424 c3"),
    ],
)
def test_what_is_read_or_not_understood_counts_as_used(register, text):
    assert not unused(code(text), 0x1000, register)


def test_code_up_to_the_end_of_a_page_is_enough():
    data = bytes.fromhex("b801000000c3")

    def read(address, size):
        if address + size > 0x2000:
            raise OSError(errno.EIO, "the next page is not there")
        return data[address - 0x1FFA :][:size]

    assert unused(read, 0x1FFA, R10)


PLACES = Places(task=64, state=56, soft=32, expires=24, function=40)
TASK = 0xFFFF888012345600
NOW = 10**15


def sleeper(soft, *, expires=None, state=1, function=0xFFFFFFFF81234560, task=TASK):
    timer = struct.pack("<QQQQQQ", 0, 0, 0, soft if expires is None else expires, soft, function)
    return timer + struct.pack("<QQQ", 0xFFFF88801FFFF000, state, task)


def test_the_timer_on_a_stack_is_found():
    stack = bytes(64) + struct.pack("<Q", TASK) + bytes(32) + sleeper(NOW + 5, expires=NOW + 55) + bytes(200)
    assert timer_on(stack, PLACES, TASK, NOW) == NOW + 5


@pytest.mark.parametrize(
    "stack",
    [
        b"",
        bytes(2048),
        sleeper(NOW + 5, task=TASK + 64),
        sleeper(NOW + 5, state=0),  # of an earlier call: it was cancelled before the memory was left
        sleeper(NOW + 5, function=0x401000),
        sleeper(NOW + 5, expires=NOW + 4),
        sleeper(NOW - 2 * 10**9),
        sleeper(NOW + 5) + sleeper(NOW + 6),  # which of the two?
        struct.pack("<Q", TASK) + bytes(100),
        sleeper(NOW + 5)[:-1],
    ],
)
def test_what_is_no_timer_is_not_taken_for_one(stack):
    assert timer_on(stack, PLACES, TASK, NOW) is None
