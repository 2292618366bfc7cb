"""What is known of aarch64's processes where no such machine is needed; the rest: tests/campaign/test_guest_aarch64.py.

Whether the machine code is its source assembled is tested there, too: it takes an assembler for that machine."""

import dataclasses
import errno
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.arch.aarch64 import cpu, engine, extended, init, sleep, stub, vdso, waits
from checkpoint.arch.aarch64 import registers as general
from checkpoint.arch.aarch64.registers import (
    CODE_BEFORE,
    SVC,
    Registers,
    Restart,
    behind_call,
    by_hand,
    for_restore,
    hides_note,
    in_its_call,
    interrupted_in,
    restarted_call,
    told,
)
from checkpoint.errors import ExtendedStateForeign, ForeignMode, MatrixInUse
from tcpstate.kernel.machine.aarch64 import SYS

M = (1 << 64) - 1
WORD = st.integers(0, M)
CODE = st.sampled_from([0, *Restart])
REGISTERS = st.builds(Registers, st.tuples(*[WORD] * 31), WORD, WORD, WORD, CODE)
PC = 0x400000
NOP = bytes.fromhex("1f2003d5")


def at_call(number, code=0, pc=PC, **x):
    values = {int(name[1:]): value & M for name, value in x.items()} | {8: int(number)}
    return Registers(tuple(values.get(n, 0) for n in range(31)), 0x7000, pc, 0, code)


def memory(code, at=PC):
    def read(address, size):
        if not at <= address <= at + len(code) - size:
            raise OSError(errno.EIO, "nothing is mapped there")
        return code[address - at :][:size]

    return read


# -- general registers


@given(REGISTERS)
def test_registers_round_trip(registers):
    assert Registers.unpack(registers.pack()) == registers
    assert Registers.unpack(registers.in_set()) == dataclasses.replace(registers, code=0)
    assert len(registers.in_set()) == 272


@pytest.mark.parametrize("data", [bytes(72), bytes(271), bytes(272) + (-5).to_bytes(8, "little", signed=True)])
def test_a_register_set_of_another_form_is_refused(data):
    with pytest.raises(ForeignMode, match="TM-0309"):
        Registers.unpack(data)


def test_tasks_of_another_mode_are_refused():
    general.require_native(at_call(SYS.read), "pid 1")
    with pytest.raises(ForeignMode, match="pid 1"):
        general.require_native(dataclasses.replace(at_call(SYS.read), pstate=0x10), "pid 1")


@given(REGISTERS)
def test_moving_a_thread_forgets_its_call_and_its_jump(registers):
    moved = registers.moved(0x1234)
    assert (moved.ip, moved.call, moved.x, moved.sp) == (0x1234, None, registers.x, registers.sp)
    # after a jump into a guarded page the kernel would expect a landing instruction
    assert moved.pstate == registers.pstate & ~0xC00


@pytest.mark.parametrize(
    ("number", "x", "code"),
    [
        (SYS.read, {}, Restart.SYS),
        (SYS.ppoll, {}, Restart.NOHAND),
        (SYS.rt_sigsuspend, {}, Restart.NOHAND),
        (SYS.restart_syscall, {}, Restart.BLOCK),
        (SYS.futex, {"x1": 128}, Restart.SYS),
        (SYS.futex, {"x1": 129}, 0),  # FUTEX_WAKE does not wait
        (SYS.futex, {"x1": 134}, 0),  # FUTEX_LOCK_PI begins again always
        (SYS.rt_sigreturn, {}, 0),  # if EINTR were put in its place the program would be lost
        (SYS.munmap, {}, 0),
        (SYS.exit_group, {}, 0),
    ],
)
def test_a_thread_before_a_call_that_waits_counts_as_stopped_in_it(number, x, code):
    seen = in_its_call(at_call(number, x0=3, **x), 1, memory(NOP + SVC, PC - 4))
    assert seen == dataclasses.replace(at_call(number, x0=3, **x), code=code)
    assert seen.call == (number if code else None)
    elsewhere = at_call(number, x0=3, **x)
    assert in_its_call(elsewhere, 1, memory(SVC + NOP, PC - 4)) == elsewhere


def test_an_eintr_that_only_the_stop_made_becomes_a_restart(monkeypatch):
    monkeypatch.setattr(general.origx0, "first_argument", {77: 5}.get)
    code = memory(SVC + NOP, PC - 4)
    stopped = at_call(SYS.epoll_pwait, x0=-errno.EINTR)
    again = in_its_call(stopped, 77, code)
    assert (again.pc, again.x[0], again.code) == (PC - 4, 5, Restart.NOHAND)
    assert in_its_call(stopped, 78, code) == stopped  # the kernel does not tell
    done = at_call(SYS.close, x0=-errno.EINTR)
    assert in_its_call(done, 77, code) == done


def test_which_threads_may_be_in_a_sleep_that_the_kernel_has_noted():
    code = memory(SVC)
    for registers in (at_call(SYS.nanosleep), at_call(SYS.clock_nanosleep), at_call(SYS.futex, x1=128, x3=64)):
        assert hides_note(registers, code) == registers.number
        assert hides_note(registers, memory(NOP)) is None
        assert hides_note(registers, memory(NOP, 0)) is None
    for registers in (at_call(SYS.clock_nanosleep, x1=1), at_call(SYS.futex, x1=128), at_call(SYS.read)):
        assert hides_note(registers, code) is None


def test_what_tells_the_kernel_how_a_call_ended():
    registers = at_call(SYS.read, Restart.SYS, x0=3)
    assert registers.untold
    ending = told(registers)
    assert (ending.pc, ending.x[0], ending.code) == (PC + 4, -512 & M, 0)
    assert not at_call(SYS.restart_syscall, Restart.BLOCK).untold
    assert not at_call(SYS.read).untold


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        (at_call(SYS.nanosleep, Restart.BLOCK, x0=16, x1=32), {0: 32}),
        (at_call(SYS.nanosleep, Restart.BLOCK, x0=16), {}),
        (at_call(SYS.clock_nanosleep, Restart.BLOCK, x2=16, x3=32), {2: 32}),
        (at_call(SYS.clock_nanosleep, Restart.BLOCK, x1=1, x2=16, x3=32), {}),
        (at_call(SYS.futex, Restart.BLOCK, x3=16), {}),
    ],
)
def test_a_rebuilt_thread_makes_its_sleep_again(before, changed):
    again = dataclasses.replace(before, code=Restart.NOHAND).with_x(changed)
    assert for_restore(before) == again
    asleep = before.with_x({8: int(SYS.restart_syscall)})
    assert for_restore(asleep, call=before.number) == again
    assert by_hand(asleep, before.number) == dataclasses.replace(again, code=0)
    # nobody knows which it was: it ends as if a signal had come
    ended = for_restore(asleep)
    assert (ended.pc, ended.result, ended.call) == (PC + 4, -errno.EINTR, None)


@given(REGISTERS)
def test_outside_of_sleeps_nothing_is_changed(registers):
    registers = dataclasses.replace(registers, code=0)
    assert by_hand(registers) == for_restore(registers) == registers


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("480c8052 010000d4", None),  # movz w8, 98 stands one instruction before: the code given ends at the svc
        ("480c8052", SYS.futex),
        ("680e80d2", SYS.clock_nanosleep),
        ("680e80d2 1f2003d5 1f2003d5", SYS.clock_nanosleep),
        ("e80780d2", None),  # read has no restart block: this is no such place
        ("1f2003d5", None),
    ],
)
def test_the_call_of_a_thread_that_was_stopped_twice_is_in_its_code(code, call):
    before = bytes.fromhex(code)
    if call is None and len(before) == 8:
        before, call = before[:4], SYS.futex
    before = before.rjust(CODE_BEFORE, b"\0")
    assert restarted_call(at_call(SYS.restart_syscall, Restart.BLOCK), before) == call
    assert restarted_call(at_call(SYS.read, Restart.SYS), before) == SYS.read


NOTED = {"uaddr": 0x1000, "val": 7, "ufds": 1, "nfds": 1, "rmtp": 0x2000}


@pytest.mark.parametrize(
    ("x", "call"),
    [
        ({"x0": 0x1000, "x1": 0x80, "x2": 7}, SYS.futex),
        ({"x0": 0x1000, "x1": 0x80, "x2": 8}, None),
        ({"x0": 0x5000, "x1": 0x2000}, SYS.nanosleep),
        ({"x0": 1, "x2": 0x5000, "x3": 0x2000}, SYS.clock_nanosleep),
        ({"x0": 1, "x1": 1, "x2": 0x5000, "x3": 0x2000}, None),
        ({"x0": 0x5000, "x1": 0x2000, "x3": 0x2000}, None),
    ],
)
def test_or_in_the_kernels_note(x, call):
    twice = at_call(SYS.restart_syscall, Restart.BLOCK, **x)
    assert sleep.known_again(twice, NOTED) == call
    assert sleep.known_again(twice, {}) is None


# -- sleeps


@pytest.mark.parametrize(
    ("number", "x", "note", "time", "rest"),
    [
        (SYS.nanosleep, {"x0": 64}, "nanosleep", 0, (0, 0)),
        (SYS.nanosleep, {"x0": 64, "x1": 80}, "nanosleep", 0, (80, 16)),
        (SYS.clock_nanosleep, {"x0": 1, "x2": 64, "x3": 96}, "nanosleep", 2, (96, 16)),
        (SYS.futex, {"x0": 64, "x1": 128, "x3": 96}, "futex", 3, (0, 0)),
    ],
)
def test_sleeps_for_a_relative_time_are_known(number, x, note, time, rest):
    found = sleep.sleep_of(at_call(SYS.restart_syscall, Restart.BLOCK, **x), number)
    assert (found.note.value, found.number, found.time, found.rest) == (note, number, time, rest)
    args, data = found.with_time(2_000_000_001, 0x77)
    assert (args[time], data) == (0x77, struct.pack("<qq", 2, 1))
    begins = sleep.beginning(at_call(0), 0x9000, found.number, args)
    assert (begins.pc, begins.x[:6], begins.number) == (0x9000, args, number)
    assert sleep.sleep_of(at_call(number, Restart.SYS, **x), number) is None


def test_what_a_sleep_begun_again_has_returned_and_goes_on_with():
    assert sleep.begun(at_call(SYS.futex, pc=0x9000), 0x9000) == sleep.BLOCK
    assert sleep.begun(at_call(SYS.futex, pc=0x9004, x0=-errno.EAGAIN), 0x9000) == -errno.EAGAIN
    before = at_call(SYS.nanosleep, Restart.BLOCK, x0=64)
    again = sleep.asleep(before, SYS.nanosleep, sleep.BLOCK)
    assert (again.pc, again.number, again.x[0]) == (PC, SYS.restart_syscall, 64)
    over = sleep.asleep(before, SYS.nanosleep, 0)
    assert (over.pc, over.x[0], over.call) == (PC + 4, 0, None)


def test_no_wait_begins_with_what_was_left():
    assert waits.wait_of(at_call(SYS.epoll_pwait, Restart.NOHAND)) is None
    assert not waits.WAITS
    assert not waits.may_change_time(memory(NOP), SYS.epoll_pwait, PC)


def test_the_kernel_lists_what_programs_find():
    assert cpu.chosen_by({"fp", "sve", "evtstrm", "cpuid"}) == {"fp", "sve"}


# -- code


def test_the_code_uses_no_stack_but_its_frame_and_says_where_jumps_land():
    for source in (engine.BOOT_SOURCE, engine.ENGINE_SOURCE):
        lines = [line.split("//")[0].split() for line in source.splitlines()]
        assert not [line for line in lines if line and line[0] in ("ret", "bl", "blr", "stp", "ldp") and "sp" in line]
        assert [" ".join(line) for line in lines if "sp," in line] == ["mov sp, x0"]
    assert engine.BOOT[engine.BOOT_STOP :].startswith(bytes.fromhex("9f2403d5"))  # bti j
    for code, stop in ((engine.BOOT, engine.BOOT_STOP), (engine.ENGINE, engine.ENGINE_STOP)):
        assert code[stop - 4 : stop] == SVC
    assert engine.ENGINE[sleep.CALL_AT :].startswith(SVC)
    assert sleep.CALL_AT < engine.ENGINE_STOP
    assert behind_call(NOP + SVC + NOP) == 8
    assert behind_call(NOP) is None


AREA = (
    struct.pack("<II", 2, 528) + bytes(range(256)) * 2 + struct.pack("<II8x", 7, 9) + struct.pack("<IIQ", 0x401, 8, 5)
)


@given(REGISTERS, WORD)
def test_a_frame_is_a_signal_frame_that_keeps_the_alternate_stack(registers, mask):
    registers = dataclasses.replace(registers, code=0)
    frame = engine.frame_of(registers, mask, 23, 7, 8, None, lambda: AREA)
    assert struct.unpack_from("<4Q", frame) == (M & ~(1 << 22), 7, 8, 23)
    context = frame[32 + 128 :]
    stack_flags, blocked = struct.unpack_from("<16x8xi4x8xQ", context)
    assert (stack_flags & ~0x80000000 not in (0, 1, 2), blocked) == (True, mask)
    found = extended.signal_frames(context, 0)
    assert [(one.ip, one.sp) for one in found] == [(registers.pc, registers.sp)]
    assert struct.unpack_from("<31Q", context, 176 + 8) == registers.x
    fpsr, fpcr, vregs, end = struct.unpack_from("<II512sQ", context, 176 + 288 + 8)
    assert (fpsr, fpcr, vregs, end) == (7, 9, bytes(range(256)) * 2, 0)


def test_an_engine_fits_its_place():
    frame = engine.frame_of(at_call(0), 0, 23, 1, 2, None, lambda: AREA)
    image = engine.engine_image(frame, 0x5000, 0x6000, 0x7000)
    assert len(image) == engine.ENGINE_SIZE
    final = struct.unpack_from("<3Q", image, len(engine.ENGINE) - 24)
    assert final == (0x5000 + engine.BOOT_STOP, 0x6000, 0x7000)
    assert len(engine.boot_image(frame)) == engine.BOOT_SIZE
    # what Debian's 6.1 leaves free in its vdso, with the table of sections: 4096 bytes, of which 2312 are needed
    assert engine.BOOT_SIZE + 40 <= 4096 - 2312 - 64


def test_a_call_by_boot_tells_how_it_is_undone():
    base = at_call(SYS.read, Restart.SYS)
    plain = engine.boot_call(base, 0x1000, 222, (1, 2, 3, 4, -1, 0))
    assert (plain.pc, plain.x[19:26], plain.x[26], plain.call) == (0x1000, (222, 1, 2, 3, 4, M, 0), 0, None)
    assert engine.boot_call(base, 0x1000, 222, (1, 2), undo=215).x[26] == 1 << 63 | 215
    of_range = engine.boot_call(base, 0x1000, 226, (1, 2, 3), undo=215, undo_args=(5, 6))
    assert of_range.x[24:27] == (5, 6, 215)
    assert engine.boot_result(at_call(0, x19=-12)) == -12
    telling = engine.telling(at_call(SYS.read, Restart.SYS, x0=3, x22=1, x26=1), 0x1050)
    assert (telling.pc, telling.number, telling.x[0]) == (0x104C, SYS.getpid, 3)
    assert (telling.x[22], telling.x[23], telling.x[26]) == (0, 0, 0)


def test_a_signal_frame_into_left_code_is_found():
    def frame(pc):
        return bytes(64) + struct.pack("<256xQQQ8xII", 0x7000, pc, 0, 0x46508001, 528) + bytes(528)

    ranges = [(0x5000, 0x6000)]
    assert interrupted_in(frame(0x5010), ranges)
    assert not interrupted_in(frame(0x6000), ranges)
    assert not interrupted_in(frame(0x5010)[:300], ranges)
    assert not interrupted_in(b"", ranges)


def test_the_programs_have_their_numbers():
    data = stub.stub_elf(0x10000000, 5)
    assert data[:4] == b"\x7fELF"
    machine, entry, phoff = struct.unpack_from("<H4xQQ", data, 18)
    kind, flags, offset, start, _, size, whole, align = struct.unpack_from("<IIQQQQQQ", data, phoff)
    assert (machine, kind, flags, offset, start, size, whole, align) == (
        183,
        1,
        5,
        0,
        0x10000000,
        len(data),
        len(data),
        4096,
    )
    assert data[entry - 0x10000000 :][:-8] == stub.STUB[:-8]
    assert struct.unpack("<ihh", data[-8:]) == (5, 1, 0)
    assert init.init_image(77) == init.INIT[:-4] + (77).to_bytes(4, "little")


def test_functions_of_another_vdso():
    assert vdso.vdso_jump(0x1234).endswith((0x1234).to_bytes(8, "little"))
    call = vdso.vdso_call("__kernel_clock_gettime")
    assert call == struct.pack("<III", 0xD2800008 | SYS.clock_gettime << 5, 0xD4000001, 0xD65F03C0)
    assert len(vdso.vdso_call("__kernel_unknown")) == 8
    assert vdso.vdso_stays("__kernel_rt_sigreturn")
    assert not vdso.vdso_stays("__kernel_gettimeofday")


# -- the other registers


def area(**sets):
    numbers = {"fp": 2, "tls": 0x401, "sve": 0x405, "pac": 0x407, "unknown": 0x999}
    whole = {"tls": bytes(8)} | sets
    return b"".join(struct.pack("<II", numbers[name], len(data)) + data for name, data in whole.items())


def sve(vl=32, longest=64, *, whole=True, cut=0):
    body = bytes(range(256)) * (32 * vl // 256 + 1) if whole else b""
    size = 16 + (32 * vl + 17 * vl // 8 + -(16 + 32 * vl + 17 * vl // 8) % 16 + 16 if whole else 528)
    data = struct.pack("<IIHHHH", size, 9000, vl, longest, int(whole), 0) + body[: 32 * vl]
    return data.ljust(size, b"\7")[: size - cut]


FP = bytes(range(240)) + bytes(288)


def test_the_fp_registers_of_an_area():
    assert extended.fp_of(area(fp=FP)) == FP
    assert extended.fp_of(area(sve=sve(whole=False))) == b"\7" * 528
    vl = 32
    whole = sve(vl)
    found = extended.fp_of(area(sve=whole))
    assert found[:512] == b"".join(whole[16 + n * vl :][:16] for n in range(32))
    assert found[512:520] == whole[extended._status_at(vl) :][:8]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        area(),
        area(fp=FP, sve=sve()),
        area(fp=FP[:-1]),
        area(fp=FP)[:-1],
        area(fp=FP, unknown=b"1"),
        area(sve=b"12"),
        area(sve=sve(cut=16)),
        area(sve=sve(vl=0)),
        area(sve=sve(vl=24)),
        struct.pack("<II", 2, 528) + FP,
    ],
)
def test_a_malformed_area_is_refused(data):
    with pytest.raises(ExtendedStateForeign, match="TM-0532"):
        extended.convert_xstate(data, (), area(fp=FP))


def test_an_area_of_another_cpu():
    plain, long = area(fp=FP), area(sve=sve())
    assert extended.convert_xstate(plain, (), plain) == plain
    assert extended.convert_xstate(long, (), long) == long
    assert extended.convert_xstate(plain, (), long) == plain
    # nothing beyond FP is in use
    short = extended.convert_xstate(area(sve=sve(whole=False)), (), plain)
    assert extended.fp_of(short) == b"\7" * 528
    with pytest.raises(ExtendedStateForeign, match="SVE"):
        extended.convert_xstate(long, (), plain)
    with pytest.raises(ExtendedStateForeign, match="vectors of 32 bytes"):
        extended.convert_xstate(long, (), area(sve=sve(vl=16, longest=16)))
    with pytest.raises(ExtendedStateForeign, match="pointer authentication"):
        extended.convert_xstate(area(fp=FP, pac=b"\1" * 64), (), plain)
    with pytest.raises(ExtendedStateForeign, match="TPIDR2"):
        extended.convert_xstate(area(fp=FP, tls=b"\1" * 16), (), plain)
    assert extended.same_layout(plain, (), long)
    assert extended.xstate_layout() == ()
    assert extended.convert_frame(FP, (), plain) == FP


class Sets:
    """Register sets of a thread, as ptrace tells them."""

    def __init__(self, **sets):
        self.sets = {2: FP, 0x401: bytes(8)} | {int(name[1:], 16): data for name, data in sets.items()}
        self.given = {}

    def get(self, tid, number, size=1 << 16):
        if number not in self.sets:
            raise OSError(errno.EINVAL, "no such set")
        return self.sets[number][:size]

    def set(self, tid, number, data):
        self.given[number] = data


@pytest.fixture
def sets(monkeypatch):
    def these(**sets):
        found = Sets(**sets)
        monkeypatch.setattr(extended.ptrace, "get_register_set", found.get)
        monkeypatch.setattr(extended.ptrace, "set_register_set", found.set)
        return found

    return these


def test_what_ptrace_tells_is_given_back(sets):
    thread = sets(x407=b"k" * 64)
    found = extended.get_extended(1)
    assert found == struct.pack("<II", 2, 528) + FP + area() + struct.pack("<II", 0x407, 64) + b"k" * 64
    thread.sets = {number: bytes(len(data)) for number, data in thread.sets.items()}
    extended.set_extended(1, found)
    assert thread.given == {2: FP, 0x407: b"k" * 64}
    assert extended.fleeting(1) is None


def test_only_vector_registers_beyond_fp_are_lost_by_calls(sets):
    sets(x405=sve(whole=False) + bytes(4000))
    assert extended.get_extended(1) == area() + struct.pack("<II", 0x405, 544) + sve(whole=False)
    assert extended.fleeting(1) is None
    sets(x405=sve())
    assert extended.fleeting(1) == extended.get_extended(1)


@pytest.mark.parametrize("number", ["x40b", "x40c"])
def test_the_matrix_registers_are_refused_while_in_use(sets, number):
    head = struct.Struct("<IIHHHH")
    sets(**{number: head.pack(16, 9000, 32, 64, 0, 0)})
    assert extended.fleeting(1) is None
    sets(**{number: head.pack(1040, 9000, 32, 64, 0, 0) + bytes(1024)})
    for look in (extended.fleeting, extended.get_extended):
        with pytest.raises(MatrixInUse, match="SME"):
            look(1)


def test_every_set_has_a_name_for_refusals():
    assert {one for one in extended._Set if one not in extended._NAMES} == {extended._Set.FP, extended._Set.TLS}
    assert all(re.fullmatch(r"[A-Za-z ]+", name) for name in extended._NAMES.values())
