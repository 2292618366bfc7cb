"""Threads that are told by what is their own are hostile until checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from state_strategies import PROCESS

from checkpoint.kernel.ptrace import RseqConfig
from checkpoint.kernel.signals import SsFlag
from checkpoint.kernel.threaditer import ThreadRow
from checkpoint.records import StatesRecord
from checkpoint.state.addresses import ClearChildTid, RestartableSequences, RobustList
from checkpoint.state.alike import AlikeThreads, Likes
from checkpoint.state.comm import Comm
from checkpoint.state.filesystem import ThreadDirectories
from checkpoint.state.pending import PendingForThread
from checkpoint.state.registers import Registers
from checkpoint.state.signals import AlternateStack
from checkpoint.state.table import ProcessState
from tcpstate.codec import from_plain, to_plain
from tcpstate.errors import BadRecord

GENERAL, STACK = bytes(range(216)), int(SsFlag.AUTODISARM)
ROW = ThreadRow(
    0, 5, 70, b"worker".ljust(16, b"\0"), 11, 12, 13, 14, int(SsFlag.AUTODISARM) | 1, 0, 3, 0, 0, b"", False, False
)
OWN = Registers(machine="m", general=GENERAL, extended=b"x" * 64, layout=(), blocked=5)


def with_model(state: ProcessState) -> ProcessState:
    """Its first thread as one that others are like."""
    first = state.threads[0]
    own = {type(one): one for one in (OWN, ThreadDirectories(), RobustList(head=0, length=24))}
    states = tuple(own.get(type(one), one) for one in first.states)
    return dataclasses.replace(state, threads=(dataclasses.replace(first, states=states),))


def likes(model: int, *tids: int) -> AlikeThreads:
    some = Likes(model)
    for tid in tids:
        some.add(
            ROW._replace(inner=tid), RseqConfig(7, 8, 9, 0), dataclasses.replace(OWN, call=7, left=3, asleep=GENERAL)
        )
    return some.told()


@settings(max_examples=3)
@given(PROCESS)
def test_it_comes_back(state: ProcessState) -> None:
    state = with_model(state)
    first, tids = state.threads[0], [1 << 20, 1 << 21]
    record = StatesRecord(states=(state,), clocks=state.clocks, alike={state.pid: (likes(first.tid, *tids),)})
    (found,) = from_plain(StatesRecord, to_plain(record)).whole()
    assert found.threads[0] == first
    assert [thread.tid for thread in found.threads[1:]] == tids
    for thread in found.threads[1:]:
        own = (
            Comm(name=b"worker"),
            RobustList(head=11, length=24),
            ClearChildTid(address=12),
            RestartableSequences(address=7, size=8, signature=9),
            AlternateStack(enabled=True, base=13, size=14, flags=STACK),
            PendingForThread(signals=()),
            dataclasses.replace(OWN, call=7, left=3, asleep=GENERAL),
        )
        kinds = {type(one) for one in own}
        assert {one for one in thread.states if type(one) in kinds} == set(own)
        assert [one for one in thread.states if type(one) not in kinds] == [
            one for one in first.states if type(one) not in kinds
        ]


def own_directories(record: StatesRecord) -> StatesRecord:
    (state,) = record.states
    first = state.threads[0]
    states = tuple(ThreadDirectories(cwd="/") if type(one) is ThreadDirectories else one for one in first.states)
    return dataclasses.replace(
        record, states=(dataclasses.replace(state, threads=(dataclasses.replace(first, states=states),)),)
    )


def changed(**changes: object) -> Callable[[StatesRecord], StatesRecord]:
    def change(record: StatesRecord) -> StatesRecord:
        ((pid, (one,)),) = record.alike.items()
        return dataclasses.replace(record, alike={pid: (dataclasses.replace(one, **changes),)})

    return change


def twice(record: StatesRecord) -> StatesRecord:
    ((pid, (one,)),) = record.alike.items()
    return dataclasses.replace(record, alike={pid: (one, one)})


BROKEN: dict[str, Callable[[StatesRecord], StatesRecord]] = {
    "of nobody": changed(model=78),
    "without registers": changed(general=b""),
    "with half of them": changed(general=GENERAL * 2 + GENERAL[:-1]),
    "without those of the call": changed(asleep=GENERAL),
    "twice": twice,
    "of one with directories": own_directories,
}


@settings(max_examples=3)
@given(PROCESS)
def test_threads_that_cannot_be(state: ProcessState) -> None:
    state = with_model(state)
    record = StatesRecord(
        states=(state,), clocks=state.clocks, alike={state.pid: (likes(state.threads[0].tid, 1 << 20, 1 << 21),)}
    )
    record.whole()
    for name, broken in BROKEN.items():
        with pytest.raises(ValueError, match=r"like|missing|twice"):
            pytest.fail(f"{name}: {broken(record).whole()}")


@settings(max_examples=3)
@given(PROCESS)
def test_rows_that_do_not_agree(state: ProcessState) -> None:
    state = with_model(state)
    good = to_plain(StatesRecord(states=(state,), clocks=state.clocks, alike={state.pid: (likes(state.pid, 1 << 20),)}))
    for name, value in {"rows": b"", "extended": []}.items():
        bad = {**good, "alike": {state.pid: [{**good["alike"][state.pid][0], name: value}]}}
        with pytest.raises(BadRecord):
            from_plain(StatesRecord, bad)
    with pytest.raises(BadRecord, match="no state"):
        from_plain(StatesRecord, {**good, "alike": {state.pid + 1: good["alike"][state.pid]}})


@settings(max_examples=3)
@given(PROCESS)
def test_a_thread_without_a_number(state: ProcessState) -> None:
    state = with_model(state)
    record = StatesRecord(states=(state,), clocks=state.clocks, alike={state.pid: (likes(state.pid, 0),)})
    with pytest.raises(ValueError, match="no thread 0"):
        record.whole()
