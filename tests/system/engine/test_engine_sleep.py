"""A sleep for a relative time goes on in a rebuilt thread with what was left, also if nobody wrote that down."""

from __future__ import annotations

import pytest

from checkpoint.arch import sleep_of
from checkpoint.inject import Injection
from checkpoint.kernel import restart_block
from checkpoint.memory import layout
from checkpoint.spawn import spawn_stub
from checkpoint.state import table
from checkpoint.state.registers import Registers
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable
from tests.system.engine.sleeps import NS, SLEEPS, sleeping
from tests.system.test_memory_roundtrip import SameFiles


@pytest.mark.parametrize("kind", SLEEPS)
def test_a_rebuilt_thread_sleeps_what_was_left(kind: str) -> None:
    with sleeping(SLEEPS[kind]) as pid:
        tree = Tree.stop([pid])
        files = SameFiles()
        (process,) = tree.processes
        with Injection(process) as injection:
            calls = CallTable()
            brk = layout.query_brk(calls)
            state = table.capture(process, injection, calls)
        memory = layout.capture(process, files, brk=brk.value)
        before = state.threads[0].get(Registers)
        assert before.call is not None
        assert 900 * NS < before.left < 1000 * NS
        pages = {vma.start: process.read(vma.start, vma.size) for vma in process.maps if vma.name == "[stack]"}
        tree.kill()
    stub = spawn_stub(state.pid, [(m.start, m.end) for m in memory.mappings])
    try:
        layout.build(memory, stub, files.descriptor)
        for start, data in pages.items():
            stub.write(start, data)
        if kind == "futex":
            # the word that it waits for to change
            stub.write(int.from_bytes(before.asleep[14 * 8 : 15 * 8], "little"), (7).to_bytes(4, "little"))
        table.build(stub, state, warn=print, elapsed=500 * NS)
        stub.leave()
        table.install(stub, state)
        thread = stub.leader
        # the kernel has a note of its own, and the registers are as they were
        assert thread.get_registers().pack() == before.asleep
        sleep = sleep_of(thread.get_registers(), before.call)
        assert sleep is not None
        again = restart_block.left(stub.pid, sleep.note)
        assert again is not None
        assert before.left - 501 * NS - 100 * NS < again < before.left - 499 * NS
    finally:
        stub.kill()
        files.close()
