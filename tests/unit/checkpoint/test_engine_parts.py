"""The parts of the engine that need no process: /proc's formats, marks, gaps, rseq, classic BPF."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.arch import BOOT_SIZE, USER_END
from checkpoint.boot import HEAD_SIZE, MARK_SIZE, Mark, head_bytes, is_head, tail
from checkpoint.errors import AddressGapMissing
from checkpoint.kernel import cbpf
from checkpoint.kernel.cbpf import Op, Verdict
from checkpoint.kernel.clone import CLONE_ARGS_SIZE, SET_TID_OFFSET, CloneArgs, CloneFlag, pack_tids
from checkpoint.kernel.rseq import abort_address
from checkpoint.procfs import FdInfo, Stat
from checkpoint.spawn import find_gap

LINE = (
    "1234 (a ) (b) S 1 1234 1234 34816 1234 4194560 10 0 0 0 1 2 0 0 20 -5 3 0 987654 1000 200 18446744073709551615 "
    "4194304 4200000 140720000000000 0 0 0 0 4096 16384 1 0 0 17 1 0 0 0 0 0 6295552 6296000 10000000 140720000000100 "
    "140720000000200 140720000000200 140720000000300 2304\n"
)


def test_a_name_with_blanks_and_brackets_is_read():
    stat = Stat.parse(LINE)
    assert (stat.pid, stat.comm, stat.state, stat.ppid) == (1234, "a ) (b", "S", 1)
    assert (stat.nice, stat.num_threads, stat.start_time, stat.exit_signal) == (-5, 3, 987654, 17)
    assert (stat.start_code, stat.start_brk, stat.env_end, stat.exit_code) == (
        4194304,
        10000000,
        140720000000300,
        2304,
    )
    assert not stat.zombie
    assert not stat.kernel_thread
    assert Stat.parse(LINE.replace(" S ", " Z ")).zombie
    assert Stat.parse(LINE.replace(" 4194560 ", " 2129984 ")).kernel_thread


def test_fdinfo_keeps_repeated_names():
    info = FdInfo((("pos", "12"), ("flags", "02100002"), ("tfd", "5 x"), ("tfd", "6 y")))
    assert (info.pos, info.flags, info["tfd"], list(info.all("tfd"))) == (12, 0o2100002, "5 x", ["5 x", "6 y"])
    assert info.get("ino") is None
    assert "ino" not in info
    with pytest.raises(KeyError):
        info["ino"]


def test_a_mark_is_found_where_it_stands():
    mark = Mark(0x7000 + 640, 480, 0x10000, 0x20000, 0x11000)
    data = bytes(640 + 480) + mark.pack() + bytes(100)
    assert Mark.find(data, 0x7000) == mark
    assert Mark.find(bytes(4096), 0x7000) is None
    assert Mark.find(data[: 640 + 480 + MARK_SIZE - 1], 0x7000) is None


def test_the_tail_must_have_room():
    assert tail(b"x" * 100 + bytes(4000)) == 128
    assert tail(b"x" * 128 + bytes(4000)) == 128
    assert tail(b"x" * 4000) is None
    assert tail(b"x" * 64 + bytes(BOOT_SIZE + MARK_SIZE)) == 64
    assert tail(b"x" * 64 + bytes(BOOT_SIZE + MARK_SIZE - 1)) is None


def test_the_table_of_sections_is_room_where_there_is_no_other():
    def vdso(start, count, size=4096):
        head = struct.pack("<40xQ10xHH2x", start, 64, count)
        return (head.ljust(start, b"x") + b"s" * 64 * count).ljust(size, b"\0")

    start = 4096 - 64 * 8 - (BOOT_SIZE + MARK_SIZE) // 64 * 64
    assert tail(vdso(start, 8)) == start  # behind the table it would be too little
    assert tail(vdso(start, 8, 8192)) == start + 64 * 8
    # something else stands behind it
    assert tail(vdso(start, 8)[:-1] + b"x") is None
    assert tail(vdso(start, 1)[:-1] + b"x") is None


def test_a_head_is_told_from_anything_else():
    assert is_head(head_bytes(5), 5)
    assert not is_head(head_bytes(5), 6)
    assert not is_head(bytes(HEAD_SIZE), 0)


@given(st.lists(st.tuples(st.integers(0, USER_END), st.integers(1, 1 << 46)), max_size=30), st.integers(1, 1 << 28))
def test_a_gap_overlaps_nothing(ranges, size):
    avoid = [(start, min(start + length, USER_END)) for start, length in ranges]
    try:
        at = find_gap(avoid, size)
    except AddressGapMissing:
        # only if the space really is nearly full: no run of free addresses has room for size and generous margins
        edges = sorted((max(start, 0x10000000), end) for start, end in avoid if end > 0x10000000)
        free, reach = 0, 0x10000000
        for start, end in [*edges, (USER_END, USER_END)]:
            free = max(free, start - reach)
            reach = max(reach, end)
        assert free < size + (8 << 20)
        return
    assert at % 4096 == 0
    assert at >= 0x10000000
    assert at + size <= USER_END
    assert not [each for each in avoid if each[0] < at + size and at < each[1]]


def reader(memory):
    def read(address, size):
        data = memory[address]
        assert len(data) == size
        return data

    return read


@pytest.mark.parametrize(
    ("ip", "expected"), [(0x400FFF, None), (0x401000, 0x402000), (0x40100F, 0x402000), (0x401010, None)]
)
def test_a_thread_in_a_critical_section_goes_on_at_its_abort(ip, expected):
    section = struct.pack("<IIQQQ", 0, 0, 0x401000, 0x10, 0x402000)
    memory = {0x7008: struct.pack("<Q", 0x5000), 0x5000: section}
    assert abort_address(0x7000, ip, reader(memory)) == expected


def test_a_thread_in_no_critical_section_stays():
    assert abort_address(0x7000, 0x401000, reader({0x7008: bytes(8)})) is None


def program(*instructions):
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


ALLOW, KILL = int(Verdict.ALLOW), 0x80000000
DATA = cbpf.seccomp_data(39, 0xC000003E, 0x1000, (1, 2 << 32 | 3))


def test_a_filter_by_number():
    listed = program((Op.LD_W_ABS, 0, 0, 0), (Op.JEQ_K, 0, 1, 39), (Op.RET_K, 0, 0, ALLOW), (Op.RET_K, 0, 0, KILL))
    assert cbpf.run(listed, DATA) == ALLOW
    other = cbpf.seccomp_data(40, 0xC000003E, 0, ())
    assert cbpf.evaluate([listed], other) == Verdict.KILL_PROCESS


@pytest.mark.parametrize(
    ("op", "operand", "result"),
    [
        (Op.ADD_K, 0xFFFFFFFF, 2),
        (Op.SUB_K, 4, 0xFFFFFFFF),
        (Op.MUL_K, 0x80000001, 0x80000003),
        (Op.DIV_K, 2, 1),
        (Op.OR_K, 4, 7),
        (Op.AND_K, 2, 2),
        (Op.XOR_K, 1, 2),
        (Op.LSH_K, 31, 0x80000000),
        (Op.RSH_K, 1, 1),
    ],
)
def test_arithmetic_is_of_32_bits(op, operand, result):
    # the low half of the second argument is 3
    load = (Op.LD_W_ABS, 0, 0, 24)
    by_constant = program(load, (op, 0, 0, operand), (Op.RET_A, 0, 0, 0))
    by_x = program((Op.LDX_IMM, 0, 0, operand), load, (op | 8, 0, 0, 0), (Op.RET_A, 0, 0, 0))
    assert cbpf.run(by_constant, DATA) == cbpf.run(by_x, DATA) == result


def test_memory_and_registers():
    code = program(
        (Op.LD_IMM, 0, 0, 5),
        (Op.ST, 0, 0, 15),
        (Op.TAX, 0, 0, 0),
        (Op.STX, 0, 0, 1),
        (Op.LD_W_LEN, 0, 0, 0),
        (Op.LDX_MEM, 0, 0, 15),
        (Op.SUB_X, 0, 0, 0),
        (Op.NEG, 0, 0, 0),
        (Op.JA, 0, 0, 1),
        (Op.RET_K, 0, 0, 9),
        (Op.RET_A, 0, 0, 0),
    )
    assert cbpf.run(code, DATA) == -(64 - 5) & 0xFFFFFFFF


def test_division_by_zero_ends_with_nothing():
    assert cbpf.run(program((Op.LD_IMM, 0, 0, 8), (Op.DIV_X, 0, 0, 0), (Op.RET_A, 0, 0, 0)), DATA) == 0


@pytest.mark.parametrize(
    "code",
    [
        program((Op.LD_IMM, 0, 0, 1)),
        program((Op.LD_W_ABS, 0, 0, 62), (Op.RET_A, 0, 0, 0)),
        program((Op.LD_W_ABS, 0, 0, 64), (Op.RET_A, 0, 0, 0)),
        program((0x30, 0, 0, 0), (Op.RET_A, 0, 0, 0)),
    ],
)
def test_what_seccomp_does_not_admit_is_no_program(code):
    with pytest.raises(ValueError, match=r"load|instruction|return"):
        cbpf.run(code, DATA)


def test_of_several_filters_the_least_decides():
    def always(action):
        return program((Op.RET_K, 0, 0, action))

    assert cbpf.evaluate([always(ALLOW), always(0x00050001)], DATA) == Verdict.ERRNO
    assert cbpf.evaluate([always(0), always(KILL), always(ALLOW)], DATA) == Verdict.KILL_PROCESS
    assert cbpf.evaluate([always(ALLOW), always(0x7FFC0000)], DATA) == Verdict.LOG


def test_clone_args_are_laid_out_as_the_kernel_has_them():
    data = CloneArgs(CloneFlag.VM | CloneFlag.VFORK, 17, 0x1234, 1).pack()
    assert len(data) == CLONE_ARGS_SIZE == 88
    words = struct.unpack("<11Q", data)
    assert words == (0x4100, 0, 0, 0, 17, 0, 0, 0, 0x1234, 1, 0)
    assert struct.unpack_from("<Q", data, SET_TID_OFFSET) == (0x1234,)
    assert pack_tids(5, 6) == struct.pack("<ii", 5, 6)
