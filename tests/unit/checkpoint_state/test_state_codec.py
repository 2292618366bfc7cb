"""Records of state: every kind comes back as it was written, and nothing odd gets through."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_strategies import PROCESS, STRATEGIES

from checkpoint.state.base import State, kind_of
from checkpoint.state.table import PROCESS_STATES, THREAD_STATES, ProcessState
from tcpstate.codec import members, pack, to_plain, unpack
from tcpstate.errors import BadRecord

ALL = PROCESS_STATES + THREAD_STATES
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@dataclasses.dataclass(frozen=True)
class Holder:
    state: State


def test_every_kind_is_in_one_table_once():
    assert len(set(ALL)) == len(ALL)
    assert set(members(State).values()) == set(ALL)


def test_every_kind_has_a_strategy():
    assert set(STRATEGIES) == set(ALL)


@pytest.mark.parametrize("kind", ALL, ids=kind_of)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(kind: type[State], data: st.DataObject) -> None:
    state = data.draw(STRATEGIES[kind])
    assert unpack(Holder, pack(Holder(state))) == Holder(state)


@SLOW
@given(PROCESS)
def test_round_trip_of_a_whole_process(process: ProcessState) -> None:
    assert unpack(ProcessState, pack(process)) == process


def _plain(process: ProcessState) -> Any:
    return msgpack.unpackb(msgpack.packb(to_plain(process)), strict_map_key=False)


@SLOW
@given(PROCESS, st.data())
def test_a_missing_kind_is_refused(process: ProcessState, data: st.DataObject) -> None:
    plain = _plain(process)
    of = data.draw(st.sampled_from([plain, *plain["threads"]]))
    del of["states"][data.draw(st.integers(0, len(of["states"]) - 1))]
    with pytest.raises(BadRecord, match="missing"):
        unpack(ProcessState, msgpack.packb(plain))


@SLOW
@given(PROCESS, st.data())
def test_a_kind_given_twice_is_refused(process: ProcessState, data: st.DataObject) -> None:
    plain = _plain(process)
    of = data.draw(st.sampled_from([plain, *plain["threads"]]))
    of["states"].append(data.draw(st.sampled_from(of["states"])))
    with pytest.raises(BadRecord, match="twice"):
        unpack(ProcessState, msgpack.packb(plain))


@SLOW
@given(PROCESS)
def test_a_kind_in_the_wrong_table_is_refused(process: ProcessState) -> None:
    plain = _plain(process)
    plain["threads"][0]["states"].append(plain["states"][0])
    with pytest.raises(BadRecord, match="does not belong"):
        unpack(ProcessState, msgpack.packb(plain))


@SLOW
@given(PROCESS)
def test_threads_must_be_led_by_the_process(process: ProcessState) -> None:
    plain = _plain(process)
    plain["threads"].reverse()
    with pytest.raises(BadRecord, match="first thread"):
        unpack(ProcessState, msgpack.packb(plain))


@SLOW
@given(PROCESS)
def test_a_thread_given_twice_is_refused(process: ProcessState) -> None:
    plain = _plain(process)
    plain["threads"].append(plain["threads"][1])
    with pytest.raises(BadRecord, match="twice"):
        unpack(ProcessState, msgpack.packb(plain))


# a plausible value of each kind, changed into one that no kernel has
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("comm", {"name": b"sixteen bytes..."}),
    ("comm", {"name": b"a\0b"}),
    ("filesystem", {"cwd": "relative", "root": None, "umask": 0}),
    ("filesystem", {"cwd": "/", "root": None, "umask": 0o1000}),
    ("filesystem", {"cwd": "/a\0b", "root": None, "umask": 0}),
    ("personality", {"bits": 0xFFFFFFFF}),
    ("personality", {"bits": -1}),
    ("resource limits", {"limits": [{"soft": 2, "hard": 1}]}),
    ("resource limits", {"limits": [{"soft": 1, "hard": 1}] * 17}),
    ("signal handlers", {"handlers": [{"signal": 9, "handler": 1, "flags": 0, "restorer": 0, "mask": 0}]}),
    ("signal handlers", {"handlers": [{"signal": 65, "handler": 1, "flags": 0, "restorer": 0, "mask": 0}]}),
    ("signal handlers", {"handlers": [{"signal": 1, "handler": 1, "flags": 0, "restorer": 0, "mask": 0}] * 2}),
    ("alternate signal stack", {"enabled": True, "base": 1, "size": 1, "flags": 1}),
    ("interval timers", {"timers": [{"which": 0, "value": 1, "interval": 0}] * 2}),
    ("interval timers", {"timers": [{"which": 3, "value": 1, "interval": 0}]}),
    ("pending signals of the process", {"signals": [bytes(127)]}),
    ("pending signals of the process", {"signals": [bytes(128)]}),
    ("pending signals of the thread", {"signals": [b"\x41" + bytes(127)]}),
    ("parent death signal", {"signal": 65}),
    ("dumpable", {"value": 3}),
    ("oom score adjustment", {"value": 1001}),
    ("cgroups", {"groups": [{"hierarchy": "", "path": "relative"}]}),
    ("membarrier", {"registered": 1}),
    ("numa policy", {"mode": 0, "nodes": [1024]}),
    ("scheduling", {"policy": 4, "nice": 0, "priority": 0, "runtime": 0, "deadline": 0, "period": 0, "flags": 0}),
    ("scheduling", {"policy": 0, "nice": 20, "priority": 0, "runtime": 0, "deadline": 0, "period": 0, "flags": 0}),
    ("cpu affinity", {"cpus": [8192]}),
    ("seccomp", {"mode": 2, "filters": [], "privileged": False, "shared": False}),
    ("seccomp", {"mode": 0, "filters": [{"code": bytes(8), "flags": 0}], "privileged": False, "shared": False}),
    ("seccomp", {"mode": 2, "filters": [{"code": bytes(9), "flags": 0}], "privileged": False, "shared": False}),
    ("seccomp", {"mode": 2, "filters": [{"code": bytes(8), "flags": 1}], "privileged": False, "shared": False}),
    ("machine check policy", {"policy": 3}),
    ("restartable sequences", {"address": 1, "size": 1 << 32, "signature": 0}),
]


@pytest.mark.parametrize(("kind", "fields"), WRONG, ids=[f"{k}-{i}" for i, (k, _) in enumerate(WRONG)])
def test_values_out_of_range_are_refused(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        unpack(Holder, msgpack.packb({"state": {"kind": kind, **fields}}))


def test_capabilities_that_no_kernel_gives_are_refused():
    sets = {"inheritable": 0, "permitted": 0, "effective": 1, "bounding": 0, "ambient": 0}
    ids = {"real": 0, "effective": 0, "saved": 0, "fs": 0}
    fields = {"users": ids, "group_ids": ids, "groups": [], "securebits": 0, "no_new_privs": False}
    with pytest.raises(BadRecord, match="permitted"):
        unpack(Holder, msgpack.packb({"state": {"kind": "credentials", "capabilities": sets, **fields}}))


@SLOW
@given(PROCESS)
def test_get_finds_a_state_by_its_class(process: ProcessState) -> None:
    for kind in PROCESS_STATES:
        assert type(process.get(kind)) is kind
    for kind in THREAD_STATES:
        assert type(process.threads[1].get(kind)) is kind
    with pytest.raises(LookupError):
        process.get(THREAD_STATES[0])
