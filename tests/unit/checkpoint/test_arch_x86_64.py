"""The machine code is what its source says, and interrupted calls restart as signal(7) and the kernel have it."""

import dataclasses
import errno
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.arch.x86_64 import engine, init, sleep, stub
from checkpoint.arch.x86_64.registers import (
    CODE_BEFORE,
    Registers,
    Restart,
    behind_call,
    by_hand,
    for_restore,
    going_on,
    hides_note,
    in_its_call,
    interrupted_in,
    restarted_call,
    told,
)
from checkpoint.arch.x86_64.registers import require_native as native
from checkpoint.arch.x86_64.sleep import known_again
from checkpoint.errors import ForeignMode
from tcpstate.kernel.machine import SYS

WORD = st.integers(0, (1 << 64) - 1)
REGISTERS = st.builds(Registers, *[WORD] * 27)
M = (1 << 64) - 1


def assemble(source, directory):
    text, obj, flat = directory / "r.s", directory / "r.o", directory / "r.bin"
    text.write_text(source)
    subprocess.run(["as", "--64", "-o", obj, text], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
    names = subprocess.run(["nm", obj], check=True, capture_output=True, text=True).stdout.split("\n")
    return flat.read_bytes(), {line.split()[2]: int(line.split()[0], 16) for line in names if line}


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (engine.BOOT_SOURCE, engine.BOOT),
        (engine.ENGINE_SOURCE, engine.ENGINE),
        (stub.SPAWN_SOURCE, stub.SPAWN),
        (stub.STUB_SOURCE, stub.STUB),
        (init.INIT_SOURCE, init.INIT),
    ],
    ids=["boot", "engine", "spawn", "stub", "init"],
)
def test_code_is_its_source_assembled(source, code, tmp_path):
    assert assemble(source, tmp_path)[0] == code


def test_the_stops_are_where_the_source_has_them(tmp_path):
    code, names = assemble(engine.BOOT_SOURCE, tmp_path)
    assert names["boot"] == 0
    assert names["boot_stop"] == engine.BOOT_STOP
    assert names["frame"] == len(code) - engine._FRAME.size
    code, names = assemble(engine.ENGINE_SOURCE, tmp_path)
    assert names["engine"] == 0
    assert names["engine_stop"] == engine.ENGINE_STOP
    assert names["frame"] == len(code) - engine._FRAME.size - 24
    assert names["final"] == len(code) - 24


def test_the_code_uses_no_stack_but_its_frame():
    for source in (engine.BOOT_SOURCE, engine.ENGINE_SOURCE):
        lines = [line.split("#")[0].split() for line in source.splitlines()]
        assert not [line for line in lines if line and line[0] in ("push", "pop", "call", "ret")]
        touched = [" ".join(line) for line in lines if any("rsp" in word for word in line)]
        # the flags come from the frame, while every signal is blocked
        assert touched == ["lea rsp, [rip + f_flags]", "mov rsp, [rip + f_rsp]", "f_rsp: .quad 0"]


def test_the_way_home_changes_no_flags():
    for source in (engine.BOOT_SOURCE, engine.ENGINE_SOURCE):
        lines = [line.split("#")[0].split() for line in source.splitlines()]
        after = lines[lines.index(["popfq"]) + 1 : lines.index(["jmp", "[rip", "+", "f_rip]"])]
        assert {line[0] for line in after if line} == {"mov", "lea", "syscall"}


def test_the_frame_has_every_general_register():
    plain = {field.name for field in dataclasses.fields(Registers)}
    missing = plain - set(engine._FRAME_NAMES)
    # segments and bases are not changed by our code; orig_rax is the kernel's
    assert missing == {"orig_rax", "cs", "eflags", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"}
    assert "flags" in engine._FRAME_NAMES


@given(REGISTERS, WORD)
def test_frames_are_packed_in_their_order(registers, mask):
    registers = dataclasses.replace(registers, orig_rax=M)
    words = struct.unpack("<24Q", engine.frame_of(registers, mask, 23, 7, 8, None, bytes))
    for name, word in zip(engine._FRAME_NAMES, words, strict=True):
        expected = {
            "flags": registers.eflags,
            "mask": mask,
            "busy": M & ~(1 << 22),
            "all": M,
            "tgid": 7,
            "tid": 8,
            "signal": 23,
        }.get(name)
        assert word == (getattr(registers, name) if expected is None else expected), name


@given(REGISTERS)
def test_registers_round_trip(registers):
    assert Registers.unpack(registers.pack()) == registers
    assert len(registers.pack()) == 216


def test_a_32_bit_register_set_is_refused():
    with pytest.raises(ForeignMode, match="TM-0309"):
        Registers.unpack(bytes(68))


@pytest.mark.parametrize(("changes", "fits"), [({}, True), ({"cs": 0x23}, False), ({"orig_rax": 0x40000001}, False)])
def test_tasks_of_another_mode_are_refused(changes, fits):
    registers = in_call(SYS.read, 0, **changes)
    if fits:
        native(registers, "pid 1")
    else:
        with pytest.raises(ForeignMode, match="pid 1"):
            native(registers, "pid 1")


def in_call(nr, result, **values):
    zero = Registers(*[0] * 27)
    base = {"orig_rax": int(nr), "rax": result & M, "rip": 0x401002, "cs": 0x33}
    return dataclasses.replace(zero, **{**base, **values})


@pytest.mark.parametrize("nr", [SYS.epoll_wait, SYS.epoll_pwait, SYS.rt_sigtimedwait, SYS.semtimedop, SYS.recvfrom])
def test_an_eintr_that_only_the_stop_made_becomes_a_restart(nr):
    fixed = going_on(in_call(nr, -errno.EINTR))
    assert fixed == in_call(nr, Restart.NOHAND)


@pytest.mark.parametrize(
    "registers",
    [
        in_call(SYS.close, -errno.EINTR),  # done, although it was interrupted
        in_call(SYS.epoll_wait, 3),
        in_call(SYS.epoll_wait, -errno.EINTR, orig_rax=M),  # not in a call: an old result in rax
        in_call(SYS.nanosleep, Restart.BLOCK),
        in_call(SYS.read, Restart.SYS),
    ],
)
def test_all_else_is_left_to_the_kernel(registers):
    assert going_on(registers) == registers


@pytest.mark.parametrize("note", [Restart.SYS, Restart.NOINTR, Restart.NOHAND])
def test_a_restart_by_hand_executes_the_instruction_again(note):
    again = by_hand(in_call(SYS.read, note, rdi=5))
    assert again == in_call(SYS.read, 0, rdi=5, rax=int(SYS.read), rip=0x401000, orig_rax=M)


def test_a_restart_by_hand_of_a_sleep_uses_the_restart_block():
    assert by_hand(in_call(SYS.nanosleep, Restart.BLOCK)).rax == SYS.restart_syscall


@given(REGISTERS)
def test_outside_of_calls_nothing_is_restarted(registers):
    registers = dataclasses.replace(registers, orig_rax=M)
    assert by_hand(registers) == registers
    assert for_restore(registers) == registers
    assert going_on(registers) == registers


def test_a_finished_call_is_not_restarted_by_hand():
    assert by_hand(in_call(SYS.read, 7)) == in_call(SYS.read, 7, orig_rax=M)


@pytest.mark.parametrize(
    ("before", "remaining", "changed"),
    [
        (in_call(SYS.nanosleep, Restart.BLOCK, rdi=0x10, rsi=0x20), None, {"rdi": 0x20}),
        (in_call(SYS.nanosleep, Restart.BLOCK, rdi=0x10), None, {}),
        (in_call(SYS.clock_nanosleep, Restart.BLOCK, rdx=0x10, r10=0x20), None, {"rdx": 0x20}),
        (in_call(SYS.clock_nanosleep, Restart.BLOCK, rdx=0x10, r10=0x20, rsi=1), None, {}),
        (in_call(SYS.poll, Restart.BLOCK, rdx=5000), None, {}),
        (in_call(SYS.poll, Restart.BLOCK, rdx=5000), 1_500_001, {"rdx": 2}),
        (in_call(SYS.poll, Restart.BLOCK, rdx=5000), -3, {"rdx": 0}),
        (in_call(SYS.futex, Restart.BLOCK, r10=0x10), None, {}),
    ],
)
def test_a_rebuilt_thread_makes_its_sleep_again(before, remaining, changed):
    expected = dataclasses.replace(before, rax=Restart.NOHAND & M, **changed)
    assert for_restore(before, remaining) == expected


def test_a_thread_that_was_stopped_twice_makes_its_own_call_again():
    twice = in_call(SYS.restart_syscall, Restart.BLOCK, rdi=0x10, rsi=0x20)
    again = for_restore(twice, call=SYS.nanosleep)
    assert (again.call, again.result, again.rdi) == (SYS.nanosleep, Restart.NOHAND, 0x20)
    # nobody knows which it was: it ends as if a signal had come
    ended = for_restore(twice)
    assert (ended.call, ended.result) == (None, -errno.EINTR)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("b8ca000000 0f05", SYS.futex),
        ("48c7c023000000 0f05", SYS.nanosleep),
        ("4889f8 b807000000 0f05", SYS.poll),
        ("b801000000 0f05", None),  # write(2) has no restart block: this is no such place
        ("4889f8 0f05", None),
        ("b8ca000000 9090", None),
    ],
)
def test_the_call_of_a_thread_that_was_stopped_twice_is_in_its_code(code, call):
    before = bytes.fromhex(code).rjust(CODE_BEFORE, b"\x90")
    assert restarted_call(in_call(SYS.restart_syscall, Restart.BLOCK), before) == call
    assert restarted_call(in_call(SYS.poll, Restart.BLOCK), before) == SYS.poll


NOTED = {"uaddr": 0x1000, "val": 7, "ufds": 0x1000, "nfds": 7, "rmtp": 0x2000}


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ({"rdi": 0x1000, "rsi": 0x80, "rdx": 7}, SYS.futex),
        ({"rdi": 0x1000, "rsi": 0x80, "rdx": 8}, None),
        ({"rdi": 0x1000, "rsi": 7, "rdx": 500}, SYS.poll),
        ({"rdi": 0x5000, "rsi": 0x2000}, SYS.nanosleep),
        ({"rdi": 1, "rsi": 0, "rdx": 0x5000, "r10": 0x2000}, SYS.clock_nanosleep),
        ({"rdi": 1, "rsi": 1, "rdx": 0x5000, "r10": 0x2000}, None),  # until a fixed time: it has no such note
        ({"rdi": 0x5000, "rsi": 0x2000, "r10": 0x2000}, None),  # either of two
        ({}, None),
    ],
)
def test_the_call_of_a_thread_that_was_stopped_twice_is_in_the_kernels_note(arguments, call):
    known = {"rdi": 0, "rsi": 0, "rdx": 0, "r10": 0}
    twice = in_call(SYS.restart_syscall, Restart.BLOCK, **(known | arguments))
    assert known_again(twice, NOTED) == call
    assert known_again(twice, {}) is None
    assert known_again(in_call(SYS.futex, Restart.BLOCK, **(known | arguments)), NOTED) is None


def test_other_notes_are_left_to_the_kernel_of_the_rebuilt_thread():
    registers = in_call(SYS.read, Restart.SYS)
    assert for_restore(registers) == registers


def test_moving_a_thread_forgets_its_call():
    moved = in_call(SYS.read, Restart.SYS).moved(0x1234)
    assert (moved.ip, moved.call) == (0x1234, None)


def test_a_call_by_boot_tells_how_it_is_undone():
    base = in_call(SYS.pause, Restart.NOHAND, fs_base=77)
    plain = engine.boot_call(base, 0x1000, 9, (1, 2, 3, 4, -1, 0))
    got = [getattr(plain, name) for name in ("rip", "rbx", "rbp", "r12", "r13", "r14", "r8", "r9", "r15")]
    assert got == [0x1000, 9, 1, 2, 3, 4, M, 0, 0]
    assert (plain.call, plain.fs_base) == (None, 77)
    of_result = engine.boot_call(base, 0x1000, 9, (1, 2), undo=11)
    assert of_result.r15 == 1 << 63 | 11
    of_range = engine.boot_call(base, 0x1000, 10, (1, 2, 3), undo=11, undo_args=(5, 6))
    assert (of_range.r15, of_range.r8, of_range.r9) == (11, 5, 6)


def test_results_of_boot_are_signed():
    assert engine.boot_result(in_call(0, 0, rbx=-12 & M)) == -12
    assert engine.boot_result(in_call(0, 0, rbx=0x7000)) == 0x7000


def test_an_engine_fits_its_place():
    frame = engine.frame_of(in_call(0, 0), 0, 23, 1, 2, None, bytes)
    image = engine.engine_image(frame, 0x5000, 0x6000, 0x7000)
    assert len(image) == engine.ENGINE_SIZE
    assert image[: engine.ENGINE_STOP] == engine.ENGINE[: engine.ENGINE_STOP]
    final = struct.unpack_from("<3Q", image, len(engine.ENGINE) - 24)
    assert final == (0x5000 + engine.BOOT_STOP, 0x6000, 0x7000)
    assert struct.unpack_from("<3Q", engine.engine_image(frame), len(engine.ENGINE) - 24) == (0, 0, 0)


def test_a_signal_frame_into_left_code_is_found():
    inside = struct.pack("<QQQ", 0x5010, 0x246, 0x2B << 48 | 0x33)
    elsewhere = struct.pack("<QQQ", 0x9010, 0x246, 0x33)
    mere_number = struct.pack("<QQQ", 0x5010, 0x246, 0x34)
    ranges = [(0x5000, 0x6000)]
    assert interrupted_in(bytes(64) + inside + bytes(8), ranges)
    assert interrupted_in(inside, ranges)
    assert not interrupted_in(bytes(64) + elsewhere, ranges)
    assert not interrupted_in(bytes(64) + mere_number, ranges)
    assert not interrupted_in(inside[:16], ranges)
    assert not interrupted_in(b"", ranges)


def test_the_stub_is_an_elf_file_of_one_page():
    data = stub.stub_elf(0x10000000, 5)
    assert data[:4] == b"\x7fELF"
    entry, phoff = struct.unpack_from("<QQ", data, 24)
    kind, flags, offset, start, _, size, memory, align = struct.unpack_from("<IIQQQQQQ", data, phoff)
    assert (kind, flags, offset, start, size, memory, align) == (1, 5, 0, 0x10000000, len(data), len(data), 4096)
    code = data[entry - 0x10000000 :]
    assert len(code) == len(stub.STUB)
    assert struct.unpack_from("<ihh", code, 2) == (5, 1, 0)
    assert len(data) < 4096


def inside_of(number, result=Restart.BLOCK, **arguments):
    registers = Registers(*[0] * 27)
    return dataclasses.replace(registers, orig_rax=number, rip=0x1000, rax=result & M, **arguments)


@pytest.mark.parametrize(
    ("number", "arguments", "note", "time"),
    [
        (SYS.nanosleep, {"rdi": 64}, "nanosleep", 0),
        (SYS.clock_nanosleep, {"rdi": 1, "rdx": 64}, "nanosleep", 2),
        (SYS.poll, {"rdi": 64, "rsi": 2, "rdx": 1000}, "poll", 2),
        (SYS.futex, {"rdi": 64, "rsi": 128, "r10": 96}, "futex", 3),
    ],
)
def test_sleeps_for_a_relative_time_are_known(number, arguments, note, time):
    found = sleep.sleep_of(inside_of(number, **arguments), number)
    assert (found.note.value, found.number, found.time) == (note, number, time)
    args, data = found.with_time(2_000_000_001, 0x77)
    assert args[time] == (2001 if note == "poll" else 0x77)
    assert data == (b"" if note == "poll" else struct.pack("<qq", 2, 1))
    assert [a for i, a in enumerate(args) if i != time] == [a for i, a in enumerate(found.args) if i != time]


@pytest.mark.parametrize(
    ("number", "result", "arguments"),
    [
        (SYS.clock_nanosleep, Restart.BLOCK, {"rsi": 1, "rdx": 64}),  # until a fixed time
        (SYS.futex, Restart.BLOCK, {"rsi": 9, "r10": 96}),  # FUTEX_WAIT_BITSET: likewise
        (SYS.nanosleep, -errno.EINTR, {"rdi": 64}),
        (SYS.read, Restart.BLOCK, {}),
        (None, Restart.BLOCK, {}),
    ],
)
def test_others_are_not(number, result, arguments):
    registers = inside_of(SYS.read if number is None else number, result, **arguments)
    assert sleep.sleep_of(registers, number) is None


def test_where_a_sleep_writes_what_is_left():
    assert sleep.sleep_of(inside_of(SYS.nanosleep, rsi=0x700), SYS.nanosleep).rest == (0x700, 16)
    assert sleep.sleep_of(inside_of(SYS.clock_nanosleep, rdi=1, r10=0x800), SYS.clock_nanosleep).rest == (0x800, 16)
    assert sleep.sleep_of(inside_of(SYS.nanosleep), SYS.nanosleep).rest == (0, 0)
    assert sleep.sleep_of(inside_of(SYS.poll, rsi=1), SYS.poll).rest == (0, 0)


def test_what_a_sleep_begun_again_goes_on_with():
    registers = inside_of(SYS.restart_syscall, rdi=64)
    again = sleep.asleep(registers, SYS.nanosleep, Restart.BLOCK)
    assert again == dataclasses.replace(registers, orig_rax=SYS.nanosleep)
    over = sleep.asleep(registers, SYS.nanosleep, 0)
    assert (over.result, over.call) == (0, None)


def test_an_engine_has_an_instruction_that_makes_a_call():
    assert engine.ENGINE[sleep.CALL_AT :].startswith(b"\x0f\x05")
    assert sleep.CALL_AT < engine.ENGINE_STOP


def test_the_register_set_says_all_that_the_kernel_knows_of_a_call():
    registers = in_call(SYS.read, Restart.SYS)
    assert not registers.untold
    assert registers.in_set() == registers.pack()
    assert told(registers) == in_its_call(registers, 1, bytes) == registers
    assert hides_note(in_call(SYS.nanosleep, Restart.BLOCK), bytes) is None
    assert behind_call(b"\x90\x0f\x05\x90") == 3
    assert behind_call(b"\x90") is None
    telling = engine.telling(registers, 0x1050)
    assert (telling.rip, telling.rax, telling.call, telling.r14, telling.r15) == (0x104E, SYS.getpid, None, 0, 0)
    assert sleep.entering(registers) == SYS.read
    assert sleep.begun(registers, 0x401000) == Restart.SYS
