"""Each kind of state: set up in one process by other means, captured, rebuilt in a second, captured there again."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
from own_task import OwnThread, capture, in_child, own_view, rebuild, round_trip

from checkpoint.errors import DirectoryGone
from checkpoint.kernel.ptrace import RseqConfig
from checkpoint.kernel.sched import Policy
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.base import TaskBuilder
from checkpoint.state.cgroup import Cgroup, Cgroups
from checkpoint.state.comm import Comm
from checkpoint.state.filesystem import Filesystem
from checkpoint.state.hardening import MachineCheckPolicy, SpeculationControls, TimeStampCounter
from checkpoint.state.kernel_files import CoredumpFilter, OomScoreAdjustment
from checkpoint.state.lasting import Dumpable, ParentDeathSignal
from checkpoint.state.limits import ResourceLimits
from checkpoint.state.membarrier import Membarrier, MembarrierCommand
from checkpoint.state.memory_switches import MemoryDenyWriteExecute, MemorySwitches
from checkpoint.state.mempolicy import NumaPolicy
from checkpoint.state.personality import Personality
from checkpoint.state.scheduling import CpuAffinity, IoPriority, Scheduling, TimerSlack
from checkpoint.state.signals import AlternateStack, SignalHandlers
from checkpoint.state.subreaper import ChildSubreaper
from tcpstate.kernel import batch
from tcpstate.kernel.batch import libc
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr


def _syscall(nr: int, *args: object) -> None:
    assert libc.syscall(ctypes.c_long(nr), *args) >= 0


def test_comm():
    first, second = round_trip(lambda: libc.prctl(15, b"a name \xff"), Comm)
    assert first == second == Comm(name=b"a name \xff")


def test_comm_is_not_read_beyond_its_end():
    first, _ = round_trip(lambda: libc.prctl(15, b"much longer than fifteen"), Comm)
    assert first.name == b"much longer tha"


def test_filesystem(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"not \xff utf-8")
    place.mkdir()
    first, second = round_trip(lambda: (os.chdir(place), os.umask(0o137)), Filesystem)
    assert first == second == Filesystem(cwd=str(place), root=None, umask=0o137)


def test_a_removed_working_directory_is_refused(tmp_path: Path) -> None:
    def work() -> str:
        place = tmp_path / "gone"
        place.mkdir()
        os.chdir(place)
        place.rmdir()
        with pytest.raises(DirectoryGone) as caught:
            capture(Filesystem)
        return caught.value.object

    assert in_child(work).startswith("pid ")


def test_a_working_directory_hidden_by_another_of_its_name_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        place = tmp_path / "twice"
        place.mkdir()
        os.chdir(place)
        place.rmdir()
        place.mkdir()
        with pytest.raises(DirectoryGone):
            capture(Filesystem)

    in_child(work)


def test_child_subreaper():
    first, second = round_trip(lambda: libc.prctl(36, 1, 0, 0, 0), ChildSubreaper)
    assert first == second == ChildSubreaper(enabled=True)


def test_personality():
    no_randomize = 0x0040000
    first, second = round_trip(lambda: libc.personality(no_randomize), Personality)
    assert first == second == Personality(bits=no_randomize)


def test_resource_limits():
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))

    first, second = round_trip(prepare, ResourceLimits)
    assert first == second
    assert (first.limits[resource.RLIMIT_NOFILE].soft, first.limits[resource.RLIMIT_NOFILE].hard) == (77, 99)
    assert len(first.limits) == 16


def test_signal_handlers():
    def prepare() -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.siginterrupt(signal.SIGUSR1, False)

    first, second = round_trip(prepare, SignalHandlers)
    assert first == second
    by_number = {h.signal: h for h in first.handlers}
    assert by_number[signal.SIGHUP].handler == 1
    assert by_number[signal.SIGUSR1].handler > 1
    # Python ignores SIGPIPE, so the rebuilding process did: it must be back at the default.
    assert by_number[signal.SIGPIPE].handler == 0


def test_alternate_stack():
    stack = ctypes.create_string_buffer(65536)

    def prepare() -> None:
        data = struct.pack("<QiiQ", ctypes.addressof(stack), -(1 << 31), 0, 65536)  # SS_AUTODISARM
        _syscall(SYS.sigaltstack, data, None)

    first, second = round_trip(prepare, AlternateStack)
    assert first == second
    assert first == AlternateStack(enabled=True, base=ctypes.addressof(stack), size=65536, flags=1 << 31)


def test_no_alternate_stack():
    off = AlternateStack(enabled=False, base=0, size=0, flags=0)
    first, second = round_trip(
        lambda: _syscall(SYS.sigaltstack, struct.pack("<QiiQ", 0, 2, 0, 0), None), AlternateStack
    )
    assert first == second == off


def test_robust_list():
    head = ctypes.create_string_buffer(24)
    first, second = round_trip(
        lambda: _syscall(SYS.set_robust_list, ctypes.c_long(ctypes.addressof(head)), ctypes.c_long(24)), RobustList
    )
    assert first == second == RobustList(head=ctypes.addressof(head), length=24)


def test_clear_child_tid():
    place = ctypes.create_string_buffer(8)
    address = ctypes.addressof(place)
    first, second = round_trip(lambda: _syscall(SYS.set_tid_address, ctypes.c_long(address)), ClearChildTid)
    assert first == second == ClearChildTid(address=address)


def test_restartable_sequences_are_what_ptrace_says():
    thread = OwnThread(os.getpid(), rseq=RseqConfig(4096, 32, 0x53053053, 0))
    assert capture(RestartableSequences, own_view(thread)) == RestartableSequences(
        address=4096, size=32, signature=0x53053053
    )
    assert capture(RestartableSequences, own_view()).address == 0


def test_timer_slack():
    first, second = round_trip(lambda: libc.prctl(29, 123_456), TimerSlack)
    assert first == second == TimerSlack(nanoseconds=123_456)


def test_scheduling():
    def prepare() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.nice(7)

    first, second = round_trip(prepare, Scheduling)
    assert first == second
    assert (first.policy, first.nice, first.runtime) == (Policy.BATCH, 7, 0)


def test_cpu_affinity():
    one = min(os.sched_getaffinity(0))
    first, second = round_trip(lambda: os.sched_setaffinity(0, [one]), CpuAffinity)
    assert first == second == CpuAffinity(cpus=(one,))


def test_a_thread_that_was_never_bound_stays_free():
    def work() -> set[int]:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        assert rebuild(CpuAffinity(cpus=())) == []
        return os.sched_getaffinity(0)

    assert capture(CpuAffinity) == CpuAffinity(cpus=())
    assert in_child(work) == os.sched_getaffinity(0)


def test_cpus_that_are_absent_here_are_told():
    def work() -> tuple[list[str], set[int]]:
        return rebuild(CpuAffinity(cpus=(0, 8000))), os.sched_getaffinity(0)

    warnings, cpus = in_child(work)
    assert cpus == {0}
    assert len(warnings) == 1
    assert "8000" in warnings[0]


def test_io_priority():
    best_effort_6 = 2 << 13 | 6
    first, second = round_trip(
        lambda: _syscall(SYS.ioprio_set, ctypes.c_long(1), ctypes.c_long(0), ctypes.c_long(best_effort_6)), IoPriority
    )
    assert first == second == IoPriority(value=best_effort_6)


def test_memory_switches():
    first, second = round_trip(lambda: libc.prctl(41, 1, 0, 0, 0), MemorySwitches)
    assert first == second
    assert first.thp_disable == 1


def test_memory_deny_write_execute():
    first, second = round_trip(lambda: libc.prctl(65, 1, 0, 0, 0), MemoryDenyWriteExecute)
    assert first == second
    assert first.flags == 1


def test_membarrier():
    command = MembarrierCommand.REGISTER_PRIVATE_EXPEDITED
    first, second = round_trip(lambda: _syscall(SYS.membarrier, ctypes.c_long(command), 0, 0), Membarrier)
    assert first == second == Membarrier(registered=int(command))


def test_membarrier_of_a_kernel_that_cannot_tell_registers_everything():
    known = in_child(lambda: (rebuild(Membarrier(registered=None)), capture(Membarrier))[1])
    assert known.registered is not None
    assert known.registered.bit_count() >= 3


def test_numa_policy():
    bind = 2
    mask = (1).to_bytes(128, "little")
    first, second = round_trip(
        lambda: _syscall(SYS.set_mempolicy, ctypes.c_long(bind), mask, ctypes.c_long(1025)), NumaPolicy
    )
    assert first == second == NumaPolicy(mode=bind, nodes=(0,))


def test_time_stamp_counter():
    def work() -> bool:
        # All in one table: without the counter nothing of this program could run in between.
        task = own_view().tasks[0]
        TimeStampCounter(readable=False).rebuild(TaskBuilder(pid=1, tid=1, warn=print, calls=task.calls))
        begun = TimeStampCounter.capture(task)
        next(begun)
        task.calls.call(SYS.prctl, Pr.SET_TSC, 1)
        batch.run(task.calls)
        with pytest.raises(StopIteration) as stop:
            next(begun)
        return bool(stop.value.value.readable)

    assert capture(TimeStampCounter).readable
    assert not in_child(work)


def test_machine_check_policy():
    first, second = round_trip(lambda: libc.prctl(33, 1, 1, 0, 0), MachineCheckPolicy)
    assert first == second == MachineCheckPolicy(policy=1)


def test_speculation_controls():
    prctl_disable = (1, 4)  # PR_SPEC_PRCTL in the answer; PR_SPEC_DISABLE
    first, second = round_trip(lambda: libc.prctl(53, 0, prctl_disable[1], 0, 0), SpeculationControls)
    assert first == second


def test_dumpable():
    first, second = round_trip(lambda: libc.prctl(4, 0, 0, 0, 0), Dumpable)
    assert first == second == Dumpable(value=0)


def test_dumpable_for_root_only_becomes_not_dumpable():
    value, warnings = in_child(lambda: (rebuild(Dumpable(value=2)), capture(Dumpable).value)[::-1])
    assert value == 0
    assert len(warnings) == 1


def test_parent_death_signal_of_a_child_in_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = round_trip(lambda: libc.prctl(1, 15), ParentDeathSignal)
    assert first == second == ParentDeathSignal(signal=15)


def test_parent_death_signal_of_a_root_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> tuple[list[str], int]:
        parent = os.getppid()
        monkeypatch.setattr(os, "getpid", lambda: parent)
        pid = int(os.readlink("/proc/self"))
        warnings: list[str] = []
        task = TaskBuilder(pid=pid, tid=pid, warn=warnings.append)
        ParentDeathSignal(signal=9).rebuild(task)
        batch.run(task.calls)
        out = ctypes.c_int()
        libc.prctl(2, ctypes.byref(out))
        return warnings, out.value

    warnings, value = in_child(work)
    assert value == 0
    assert "signal 9" in warnings[0]


def test_oom_score_adjustment():
    first, second = round_trip(lambda: Path("/proc/self/oom_score_adj").write_text("123"), OomScoreAdjustment)
    assert first == second == OomScoreAdjustment(value=123)


def test_coredump_filter():
    first, second = round_trip(lambda: Path("/proc/self/coredump_filter").write_text("0x7f"), CoredumpFilter)
    assert first == second == CoredumpFilter(bits=0x7F)


def test_cgroups_of_this_host_need_no_change():
    state = capture(Cgroups)
    assert state.groups
    assert in_child(lambda: rebuild(state)) == []


def test_cgroups_of_a_hierarchy_that_this_host_lacks_are_told():
    lacking = Cgroups(groups=(*capture(Cgroups).groups, Cgroup("name=elsewhere", "/web"), Cgroup("name=other", "/")))
    (warning,) = in_child(lambda: rebuild(lacking))
    assert "the cgroup /web (name=elsewhere)" in warning
