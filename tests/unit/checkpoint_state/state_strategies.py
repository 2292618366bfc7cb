"""hypothesis strategies for every kind of state: whatever a kernel may have told."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from checkpoint.arch import Component
from checkpoint.kernel.sched import Policy
from checkpoint.kernel.seccomp import Mode
from checkpoint.kernel.signals import SiCode, siginfo, timer_siginfo
from checkpoint.kernel.timers import Itimer
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.base import State
from checkpoint.state.cgroup import Cgroup, Cgroups
from checkpoint.state.clocks import Clocks
from checkpoint.state.comm import Comm
from checkpoint.state.credentials import Capabilities, Credentials, Ids
from checkpoint.state.filesystem import Filesystem, ThreadDirectories
from checkpoint.state.hardening import MachineCheckPolicy, SpeculationControls, TimeStampCounter
from checkpoint.state.itimers import IntervalTimer, IntervalTimers
from checkpoint.state.kernel_files import CoredumpFilter, OomScoreAdjustment
from checkpoint.state.keyring import SessionKeyring
from checkpoint.state.large_registers import LargeRegisters
from checkpoint.state.lasting import Dumpable, ParentDeathSignal
from checkpoint.state.limits import Limit, ResourceLimits
from checkpoint.state.membarrier import Membarrier, MembarrierCommand
from checkpoint.state.memory_switches import MemoryDenyWriteExecute, MemorySwitches
from checkpoint.state.mempolicy import NumaPolicy
from checkpoint.state.pending import PendingForProcess, PendingForThread
from checkpoint.state.personality import Personality
from checkpoint.state.posix_timers import PosixTimer, PosixTimers
from checkpoint.state.registers import Registers
from checkpoint.state.scheduling import CpuAffinity, IoPriority, Scheduling, TimerSlack
from checkpoint.state.seccomp import Filter, Seccomp
from checkpoint.state.signals import AlternateStack, Handler, SignalHandlers
from checkpoint.state.subreaper import ChildSubreaper
from checkpoint.state.table import PROCESS_STATES, THREAD_STATES, ProcessState, ThreadState
from tcpstate.kernel.prctl import MdweFlag

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
NANOSECONDS = st.integers(0, (1 << 63) - 1)
IDS = st.builds(Ids, U32, U32, U32, U32)
SIGNAL = st.integers(1, 64)
INFO = st.one_of(
    st.builds(siginfo, SIGNAL, st.sampled_from(list(SiCode))),
    st.builds(timer_siginfo, SIGNAL, st.integers(0, 99), st.integers(0, 99), U64),
)
PATH = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20).map(lambda text: "/" + text)


@st.composite
def capabilities(draw: st.DrawFn) -> Capabilities:
    inheritable, permitted = draw(U64), draw(U64)
    return Capabilities(
        inheritable=inheritable,
        permitted=permitted,
        effective=draw(U64) & permitted,
        bounding=draw(U64),
        ambient=draw(U64) & permitted & inheritable,
    )


@st.composite
def limit(draw: st.DrawFn) -> Limit:
    soft, hard = sorted((draw(U64), draw(U64)))
    return Limit(soft, hard)


@st.composite
def seccomp(draw: st.DrawFn) -> Seccomp:
    code = st.integers(1, 50).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))
    filters = draw(st.lists(st.builds(Filter, code, st.sampled_from([0, 2])), max_size=3).map(tuple))
    mode = Mode.FILTER if filters else draw(st.sampled_from([Mode.DISABLED, Mode.STRICT]))
    return Seccomp(mode=mode, filters=filters, privileged=draw(st.booleans()), shared=draw(st.booleans()))


HANDLER = st.builds(
    Handler,
    signal=SIGNAL.filter(lambda n: n not in (9, 19)),
    handler=U64,
    flags=U64,
    restorer=U64,
    mask=U64,
)
TIMER = st.builds(
    PosixTimer,
    id=st.integers(0, (1 << 31) - 1),
    clock=st.integers(-(1 << 31), 11),
    notify=st.sampled_from([0, 1, 2, 4]),
    thread=st.integers(0, 1 << 22),
    signal=st.integers(0, 64),
    data=U64,
    value=NANOSECONDS,
    interval=NANOSECONDS,
    overrun=st.integers(0, (1 << 31) - 1),
)

STRATEGIES: dict[type[State], st.SearchStrategy[State]] = {
    Filesystem: st.builds(Filesystem, cwd=PATH, root=st.none() | PATH, umask=st.integers(0, 0o777)),
    LargeRegisters: st.builds(LargeRegisters, granted=st.sampled_from([0, 1 << 18])),
    ChildSubreaper: st.builds(ChildSubreaper, enabled=st.booleans()),
    MemorySwitches: st.builds(
        MemorySwitches, thp_disable=U32, merge=st.booleans(), lock_future=st.sampled_from([0, 2, 6])
    ),
    Membarrier: st.builds(
        Membarrier, registered=st.none() | st.just(int(MembarrierCommand.REGISTER_PRIVATE_EXPEDITED)) | st.just(0)
    ),
    SessionKeyring: st.builds(
        SessionKeyring, name=st.binary(max_size=15).filter(lambda name: b"\0" not in name), keys=U32
    ),
    SignalHandlers: st.builds(SignalHandlers, handlers=st.lists(HANDLER, unique_by=lambda h: h.signal).map(tuple)),
    IntervalTimers: st.builds(
        IntervalTimers,
        timers=st.lists(
            st.builds(IntervalTimer, which=st.sampled_from(list(Itimer)), value=NANOSECONDS, interval=NANOSECONDS),
            unique_by=lambda t: t.which,
        ).map(tuple),
    ),
    PosixTimers: st.builds(
        PosixTimers,
        timers=st.lists(TIMER, unique_by=lambda t: t.id, max_size=5).map(
            lambda timers: tuple(sorted(timers, key=lambda t: t.id))
        ),
    ),
    PendingForProcess: st.builds(PendingForProcess, signals=st.lists(INFO, max_size=5).map(tuple)),
    PendingForThread: st.builds(PendingForThread, signals=st.lists(INFO, max_size=5).map(tuple)),
    ResourceLimits: st.builds(ResourceLimits, limits=st.lists(limit(), max_size=16).map(tuple)),
    MemoryDenyWriteExecute: st.builds(MemoryDenyWriteExecute, flags=st.sampled_from([MdweFlag(0), MdweFlag(3)])),
    OomScoreAdjustment: st.builds(OomScoreAdjustment, value=st.integers(-1000, 1000)),
    CoredumpFilter: st.builds(CoredumpFilter, bits=st.none() | U32),
    Cgroups: st.builds(Cgroups, groups=st.lists(st.builds(Cgroup, st.text(max_size=9), PATH), max_size=4).map(tuple)),
    Comm: st.builds(Comm, name=st.binary(max_size=15).filter(lambda name: b"\0" not in name)),
    ThreadDirectories: st.builds(
        ThreadDirectories, cwd=st.none() | PATH, root=st.none() | PATH, umask=st.integers(0, 0o777)
    ),
    Personality: st.builds(Personality, bits=st.integers(0, (1 << 32) - 2)),
    RobustList: st.builds(RobustList, head=U64, length=U64),
    ClearChildTid: st.builds(ClearChildTid, address=U64),
    RestartableSequences: st.builds(RestartableSequences, address=U64, size=U32, signature=U32),
    AlternateStack: st.builds(
        AlternateStack, enabled=st.booleans(), base=U64, size=U64, flags=st.sampled_from([0, 1 << 31])
    ),
    TimerSlack: st.builds(TimerSlack, nanoseconds=NANOSECONDS),
    NumaPolicy: st.builds(
        NumaPolicy, mode=st.integers(0, (1 << 31) - 1), nodes=st.lists(st.integers(0, 1023), max_size=4).map(tuple)
    ),
    SpeculationControls: st.builds(
        SpeculationControls,
        store_bypass=st.integers(0, 255),
        indirect_branch=st.integers(0, 255),
        l1d_flush=st.integers(0, 255),
    ),
    TimeStampCounter: st.builds(TimeStampCounter, readable=st.booleans()),
    MachineCheckPolicy: st.builds(MachineCheckPolicy, policy=st.integers(0, 2)),
    Scheduling: st.builds(
        Scheduling,
        policy=st.sampled_from(list(Policy)),
        nice=st.integers(-20, 19),
        priority=st.integers(0, 99),
        runtime=U64,
        deadline=U64,
        period=U64,
        flags=U64,
    ),
    CpuAffinity: st.builds(CpuAffinity, cpus=st.lists(st.integers(0, 8191), max_size=8).map(tuple)),
    IoPriority: st.builds(IoPriority, value=st.integers(0, 0xFFFF)),
    Registers: st.builds(
        Registers,
        machine=st.text(max_size=9),
        general=st.binary(max_size=216),
        extended=st.binary(max_size=900),
        layout=st.lists(
            st.builds(Component, st.integers(2, 62), st.integers(576, 8000), st.integers(1, 8192)), max_size=4
        ).map(tuple),
        blocked=U64,
        call=st.none() | st.integers(0, (1 << 31) - 1),
        left=NANOSECONDS,
        asleep=st.binary(max_size=216),
    ),
    Credentials: st.builds(
        Credentials,
        users=IDS,
        group_ids=IDS,
        groups=st.lists(U32, max_size=5).map(tuple),
        capabilities=capabilities(),
        securebits=U32,
        no_new_privs=st.booleans(),
    ),
    ParentDeathSignal: st.builds(ParentDeathSignal, signal=st.integers(0, 64)),
    Dumpable: st.builds(Dumpable, value=st.integers(0, 2)),
    Seccomp: seccomp(),
}

CLOCKS = st.builds(Clocks, monotonic=st.integers(0, (1 << 62) - 1), boottime=st.integers(0, (1 << 62) - 1))


def states(kinds: tuple[type[State], ...]) -> st.SearchStrategy[tuple[State, ...]]:
    """One state of each kind, in any order."""
    return st.tuples(*(STRATEGIES[kind] for kind in kinds)).flatmap(lambda each: st.permutations(each).map(tuple))


def thread(tid: int) -> st.SearchStrategy[ThreadState]:
    return st.builds(ThreadState, tid=st.just(tid), states=states(THREAD_STATES))


PROCESS: st.SearchStrategy[ProcessState] = st.builds(
    ProcessState,
    pid=st.just(77),
    states=states(PROCESS_STATES),
    threads=st.tuples(thread(77), thread(80)),
    clocks=CLOCKS,
)

Warn = Callable[[str], None]
