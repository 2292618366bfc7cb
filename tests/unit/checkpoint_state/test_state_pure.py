"""What needs no process: timers' arithmetic, clocks, parsers, XSAVE areas, the order of the tables."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_strategies import CLOCKS, STRATEGIES, Warn

from checkpoint.arch.x86_64 import xstate
from checkpoint.arch.x86_64.xstate import Component, convert_frame, convert_xstate
from checkpoint.errors import ExtendedStateForeign, MachineForeign
from checkpoint.kernel.seccomp import Action, Mode, actions
from checkpoint.kernel.timers import NS, TimerSpec
from checkpoint.state.base import State, TaskBuilder
from checkpoint.state.cgroup import Mount, mounts, parse_cgroups
from checkpoint.state.clocks import TOLERANCE, Clocks, Offsets, continued, offsets_for
from checkpoint.state.credentials import Capabilities, Credentials
from checkpoint.state.lasting import Dumpable, ParentDeathSignal
from checkpoint.state.pending import PendingForProcess
from checkpoint.state.posix_timers import PosixTimers, parse_timers
from checkpoint.state.registers import Registers
from checkpoint.state.seccomp import Filter, Seccomp
from checkpoint.state.signals import SignalHandlers
from checkpoint.state.table import PROCESS_STATES, THREAD_STATES
from tcpstate.kernel.calls import ENTRY, ENTRY_SIZE
from tcpstate.kernel.machine import SYS

TIME = st.integers(0, 10**18)


# -- timers -------------------------------------------------------------------------------------------------------


@given(TIME.filter(bool), TIME.filter(bool), TIME)
def test_a_periodic_timer_keeps_its_phase(value: int, interval: int, elapsed: int) -> None:
    left, missed = TimerSpec(value, interval).after(elapsed)
    assert left.value > 0
    assert left.interval == interval
    # the next expiration lies on the grid of the original, after what has been counted
    assert elapsed + left.value == value + missed * interval
    assert missed == 0 or value + (missed - 1) * interval <= elapsed


@given(TIME.filter(bool), TIME)
def test_a_timer_that_expires_once_does_so(value: int, elapsed: int) -> None:
    left, missed = TimerSpec(value, 0).after(elapsed)
    assert missed == 0
    assert left.value == max(value - elapsed, 1)


@given(TIME, TIME)
def test_a_disarmed_timer_stays_so(interval: int, elapsed: int) -> None:
    assert TimerSpec(0, interval).after(elapsed) == (TimerSpec(0, interval), 0)


@given(TIME, TIME)
def test_timespec_round_trip(value: int, interval: int) -> None:
    spec = TimerSpec(value, interval)
    assert TimerSpec.from_timespec(spec.pack_timespec()) == spec


@given(TIME, TIME)
def test_a_timeval_is_never_rounded_to_nothing(value: int, interval: int) -> None:
    spec = TimerSpec.from_timeval(TimerSpec(value, interval).pack_timeval())
    assert 0 <= spec.value - value < 1000
    assert 0 <= spec.interval - interval < 1000


def test_timers_of_proc():
    text = (
        "ID: 3\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n"
        "ID: 0\nsignal: 33/(null)\nnotify: signal/tid.2635\nClockID: 1\n"
        "ID: 7\nsignal: 0/0000000000000000\nnotify: none/pid.2634\nClockID: -6\n"
    )
    assert parse_timers(text) == [
        {"id": 0, "signal": 33, "data": 0, "notify": 4, "thread": 2635, "clock": 1},
        {"id": 3, "signal": 60, "data": 0x7FFF86E452A8, "notify": 0, "thread": 0, "clock": 0},
        {"id": 7, "signal": 0, "data": 0, "notify": 1, "thread": 0, "clock": -6},
    ]


def test_no_timers_of_proc():
    assert parse_timers("") == []


# -- clocks -------------------------------------------------------------------------------------------------------

OFFSETS = st.builds(Offsets, monotonic=st.integers(-(10**18), 10**18), boottime=st.integers(-(10**18), 10**18))


@given(OFFSETS)
def test_offsets_are_written_as_the_kernel_reads_them(offsets: Offsets) -> None:
    for line in offsets.format().splitlines():
        assert 0 <= int(line.split()[2]) < NS
    assert Offsets.parse(offsets.format()) == offsets


def test_offsets_as_the_kernel_shows_them():
    text = "monotonic           0         0\nboottime           -5 999999999\n"
    assert Offsets.parse(text) == Offsets(monotonic=0, boottime=-4 * NS - 1)


@given(CLOCKS, CLOCKS, OFFSETS)
def test_the_clocks_go_on(wanted: Clocks, now: Clocks, own: Offsets) -> None:
    offsets = offsets_for(wanted, now, own)
    # the host's clock is what the tool sees without its own offset
    assert now.monotonic - own.monotonic + offsets.monotonic == wanted.monotonic
    assert now.boottime - own.boottime + offsets.boottime == wanted.boottime


@pytest.mark.parametrize(
    ("monotonic", "boottime", "enough"),
    [(0, 0, True), (TOLERANCE, TOLERANCE, True), (-1, 0, False), (0, -1, False), (TOLERANCE + 1, 0, False)],
)
def test_when_the_tools_clocks_are_good_enough(monotonic: int, boottime: int, enough: bool) -> None:
    wanted = Clocks(monotonic=10**12, boottime=10**12)
    now = Clocks(monotonic=10**12 + monotonic, boottime=10**12 + boottime)
    assert continued(wanted, now) is enough


# -- cgroups ------------------------------------------------------------------------------------------------------


def test_cgroups_of_proc():
    groups = parse_cgroups("9:name=systemd:/a\n1:cpu,cpuacct:/b:c\n0::/user.slice/x.scope\n")
    assert [(g.hierarchy, g.path) for g in groups] == [
        ("name=systemd", "/a"),
        ("cpu,cpuacct", "/b:c"),
        ("", "/user.slice/x.scope"),
    ]
    assert not any(g.outside for g in groups)
    assert parse_cgroups("0::/../x")[0].outside


def test_mounts_of_cgroups():
    found = mounts(
        [
            "34 31 0:31 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct",
            "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,xattr,name=systemd",
            "41 31 0:38 /docker/1 /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate",
            "23 1 0:21 / /proc rw - proc proc rw",
        ]
    )
    assert [(m.hierarchy, m.at) for m in found] == [
        (frozenset({"cpu", "cpuacct"}), "/sys/fs/cgroup/cpu"),
        (frozenset({"name=systemd"}), "/sys/fs/cgroup/systemd"),
        (frozenset(), "/sys/fs/cgroup/unified"),
    ]
    assert found[2].directory("/docker/1/web") == "/sys/fs/cgroup/unified/web"
    assert found[2].directory("/docker/2") is None
    assert Mount(frozenset(), "/", "/c").directory("/a/b") == "/c/a/b"


# -- XSAVE areas --------------------------------------------------------------------------------------------------

AVX, AVX512, PKRU = 2, 5, 9
HERE = (Component(AVX, 576, 256), Component(PKRU, 2432, 8))
THERE = (Component(AVX, 576, 256), Component(AVX512, 1088, 64), Component(PKRU, 2688, 8))
INITIAL_PKRU = (0x55555554).to_bytes(8, "little")


def _area(size: int, xcr0: int, parts: dict[Component, bytes]) -> bytes:
    area = bytearray(size)
    area[:512] = bytes(range(256)) * 2
    struct.pack_into("<Q", area, 464, xcr0)
    struct.pack_into("<Q", area, 512, 3 | sum(1 << c.number for c in parts))
    for component, data in parts.items():
        area[component.offset : component.end] = data.ljust(component.size, b"\0")
    return bytes(area)


OWN = _area(2440, 0x207, {})


@pytest.fixture(autouse=True)
def _this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xstate, "xstate_layout", lambda: HERE)


def test_an_area_of_the_same_cpu_is_taken_as_it_is():
    area = _area(2440, 0x207, {HERE[0]: b"ymm"})
    assert convert_xstate(area, HERE, OWN) is area


def test_components_move_to_where_this_cpu_has_them():
    area = _area(2696, 0x2E7, {THERE[0]: b"ymm", THERE[2]: b"\x05"})
    made = convert_xstate(area, THERE, OWN)
    assert len(made) == len(OWN)
    assert made[:464] == area[:464]
    assert struct.unpack_from("<Q", made, 464) == (0x207,)
    assert struct.unpack_from("<Q", made, 512) == (3 | 1 << AVX | 1 << PKRU,)
    assert made[576:579] == b"ymm"
    assert made[2432] == 5


def test_a_component_in_use_that_is_absent_here_is_refused():
    area = _area(2696, 0x2E7, {THERE[1]: b"k"})
    with pytest.raises(ExtendedStateForeign, match="AVX-512 masks"):
        convert_xstate(area, THERE, OWN)


def test_a_component_in_use_that_its_own_layout_lacks_is_refused():
    area = _area(2696, 0x2E7, {THERE[1]: b"k"})
    with pytest.raises(ExtendedStateForeign, match="AVX-512 masks"):
        convert_xstate(area, (THERE[0],), OWN)


def test_an_absent_component_of_zeroes_counts_as_initial():
    area = _area(2696, 0x2E7, {THERE[1]: b""})
    assert struct.unpack_from("<Q", convert_xstate(area, THERE, OWN), 512) == (3,)


def test_an_initial_pkru_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xstate, "xstate_layout", lambda: HERE[:1])
    own = _area(832, 0x7, {})
    area = _area(2696, 0x2E7, {THERE[2]: INITIAL_PKRU})
    assert struct.unpack_from("<Q", convert_xstate(area, THERE, own), 512) == (3,)
    # nothing is denied: as without keys
    assert struct.unpack_from("<Q", convert_xstate(_area(2696, 0x2E7, {THERE[2]: b"\0"}), THERE, own), 512) == (3,)
    with pytest.raises(ExtendedStateForeign, match="protection keys"):
        convert_xstate(_area(2696, 0x2E7, {THERE[2]: b"\4"}), THERE, own)


def test_a_thread_from_a_cpu_without_keys_gets_the_kernels_default() -> None:
    own = _area(2440, 0x207, {HERE[1]: INITIAL_PKRU})
    made = convert_xstate(_area(832, 0x7, {THERE[0]: b"ymm"}), THERE[:1], own)
    assert made[2432:2436] == INITIAL_PKRU[:4]
    assert struct.unpack_from("<Q", made, 512) == (3 | 1 << AVX | 1 << PKRU,)


def _frame(area: bytes, features: int) -> bytes:
    """The area of a signal frame: the kernel's marks in the legacy region and behind it."""
    software = struct.pack("<IIQI", 0x46505853, len(area) + 4, features, len(area)).ljust(48, b"\0")
    return area[:464] + software + area[512:] + struct.pack("<I", 0x46505845)


def test_a_frame_is_put_right_in_its_place() -> None:
    frame = _frame(_area(2696, 0x2E7, {THERE[0]: b"ymm", THERE[2]: b"\x05"}), 0x2E7)
    made = convert_frame(frame, THERE, OWN)
    assert len(made) == len(frame)
    magic, extended, features, size = struct.unpack_from("<IIQI", made, 464)
    assert (magic, extended, features, size) == (0x46505853, 2700, 3 | 1 << AVX | 1 << PKRU, len(OWN))
    assert made[size : size + 4] == struct.pack("<I", 0x46505845)
    assert made[576:579] == b"ymm"
    assert made[2432] == 5
    assert made[:464] == frame[:464]


def test_a_frame_without_room_is_refused_unless_what_is_used_fits() -> None:
    small = _frame(_area(832, 0x7, {THERE[0]: b"ymm"}), 0x7)
    made = convert_frame(small, THERE[:1], OWN)
    assert struct.unpack_from("<IIQI", made, 464)[3] == 832
    assert made[832:] == struct.pack("<I", 0x46505845)
    own = _area(2440, 0x207, {HERE[1]: INITIAL_PKRU})  # a key register that the frame has no place for
    with pytest.raises(ExtendedStateForeign, match="no room"):
        convert_frame(small, THERE[:1], own)


@pytest.mark.parametrize("at", [464, 480, -1])
def test_a_frame_that_is_malformed_is_refused(at: int) -> None:
    frame = bytearray(_frame(_area(2696, 0x2E7, {THERE[0]: b"ymm"}), 0x2E7))
    frame[at] ^= 0xFF
    if at == 464:
        frame = frame[:-8]
    with pytest.raises(ExtendedStateForeign):
        convert_frame(bytes(frame), THERE, OWN)


@pytest.mark.parametrize("size", [0, 511, 575, 600])
def test_an_area_that_is_too_short_is_refused(size: int) -> None:
    area = _area(2696, 0x2E7, {THERE[0]: b"ymm"})[:size]
    with pytest.raises(ExtendedStateForeign):
        convert_xstate(area, THERE, OWN)


@given(area=st.binary(max_size=1200), layout=STRATEGIES[Registers].map(lambda r: r.layout))
def test_hostile_areas_are_converted_or_refused(area: bytes, layout: tuple[Component, ...]) -> None:
    try:
        assert len(convert_xstate(area, layout, OWN)) == len(OWN)
    except ExtendedStateForeign:
        return


def test_registers_of_another_machine_are_refused():
    state = Registers(machine="vax", general=b"", extended=b"", layout=(), blocked=0)
    with pytest.raises(MachineForeign):
        state.rebuild(TaskBuilder(pid=1, tid=1, warn=print))


# -- credentials and seccomp: what is queued, in which order ---------------------------------------------------------

BORN = {
    "Uid": "0\t0\t0\t0",
    "Gid": "0\t0\t0\t0",
    "Groups": "",
    "NoNewPrivs": "0",
    "CapInh": "0",
    "CapPrm": "ffff",
    "CapEff": "ffff",
    "CapBnd": "ffff",
    "CapAmb": "0",
}
ROOT = Credentials.of(BORN, 0)


def _born(warn: Warn) -> TaskBuilder:
    return TaskBuilder(pid=1, tid=1, warn=warn, birth=dict(BORN))


def _numbers(task: TaskBuilder) -> list[tuple[int, int, int]]:
    """(call, first, second argument) of each entry."""
    image, (start, end) = task.calls.image(0), task.calls.entries(0)
    return [ENTRY.unpack_from(image, at)[:3] for at in range(start, end, ENTRY_SIZE)]


@given(state=STRATEGIES[Credentials])
def test_privileges_end_last(state: Credentials) -> None:
    task = _born(lambda _: None)
    state.rebuild(task)
    calls = [nr for nr, _, _ in _numbers(task)]
    last_id = max(calls.index(SYS.setresuid), calls.index(SYS.setresgid), calls.index(SYS.setgroups))
    assert last_id < calls.index(SYS.capset)
    after = calls[len(calls) - calls[::-1].index(SYS.capset) :]
    assert after == ([SYS.prctl] if state.no_new_privs else [])  # only no_new_privs


def test_credentials_that_it_was_born_with_need_nothing():
    task = _born(print)
    ROOT.rebuild(task)
    assert len(task.calls) == 0


def test_capabilities_that_this_host_withholds_are_told():
    wanted = Capabilities(inheritable=0, permitted=1 << 16, effective=1 << 16, bounding=0x1FFFF, ambient=0)
    warnings: list[str] = []
    dataclasses.replace(ROOT, capabilities=wanted).rebuild(_born(warnings.append))
    assert len(warnings) == 1
    assert "CAP_SYS_MODULE" in warnings[0]


def test_no_new_privs_of_the_tool_is_told():
    warnings: list[str] = []
    task = _born(warnings.append)
    task.birth["NoNewPrivs"] = "1"
    ROOT.rebuild(task)
    assert len(warnings) == 1
    assert "no_new_privs" in warnings[0]


FILTER = Filter(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000), 0)


def _seccomp_calls(state: Seccomp, tid: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    before, after = TaskBuilder(pid=7, tid=tid, warn=print), TaskBuilder(pid=7, tid=tid, warn=print)
    state.rebuild_privileged(before)
    state.rebuild(after)
    return _numbers(before), _numbers(after)


def test_filters_of_an_unprivileged_thread_are_installed_after_its_credentials():
    state = Seccomp(mode=Mode.FILTER, filters=(FILTER, FILTER), privileged=False, shared=False)
    assert _seccomp_calls(state, 8) == ([], [(SYS.seccomp, 1, 0)] * 2)


def test_filters_that_took_privilege_are_installed_before_the_credentials():
    state = Seccomp(mode=Mode.FILTER, filters=(FILTER,), privileged=True, shared=False)
    assert _seccomp_calls(state, 8) == ([(SYS.seccomp, 1, 0)], [])


def test_shared_filters_are_installed_once_for_all_threads():
    state = Seccomp(mode=Mode.FILTER, filters=(FILTER,), privileged=False, shared=True)
    assert _seccomp_calls(state, 7) == ([], [(SYS.seccomp, 1, 1)])
    assert _seccomp_calls(state, 8) == ([], [])


def test_a_filters_program_points_to_its_code():
    task = TaskBuilder(pid=7, tid=7, warn=print)
    state = Seccomp(mode=Mode.FILTER, filters=(FILTER,), privileged=False, shared=False)
    state.rebuild(task)
    base = 0x5000
    image, (start, _) = task.calls.image(base), task.calls.entries(base)
    program = ENTRY.unpack_from(image, start - base)[3] - base
    length, code = struct.unpack_from("<H6xQ", image, program)
    assert image[code - base : code - base + 8 * length] == FILTER.code


def test_actions_of_a_filter():
    code = struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 6, 0, 0, 0x7FC00001) + FILTER.code
    assert list(actions(code)) == [Action.USER_NOTIF, 0x7FFF0000]


# -- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "later"),
    [(SignalHandlers, PendingForProcess), (PosixTimers, PendingForProcess)],
)
def test_order_of_a_process(earlier: type[State], later: type[State]) -> None:
    assert PROCESS_STATES.index(earlier) < PROCESS_STATES.index(later)


def test_order_of_a_thread():
    assert THREAD_STATES[-4:] == (Credentials, ParentDeathSignal, Dumpable, Seccomp)
