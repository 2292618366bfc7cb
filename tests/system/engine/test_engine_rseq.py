"""A thread that is stopped inside a restartable sequence goes on at its abort handler, however it goes on."""

import os
import random
import struct
import time

from checkpoint.inject import Injection
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.system.engine.target import Target, as_tool

SEED = random.randrange(1 << 32)


def next_epoch(target):
    with open(target.words, "r+b") as words:
        words.seek(16)
        (epoch,) = struct.unpack("<q", words.read(8))
        words.seek(16)
        words.write(struct.pack("<q", epoch + 1))


def aborted(target):
    return struct.unpack_from("<q", target.words.read_bytes(), 24)[0]


def visit(target, *, inject, die):
    tree = Tree.stop([target.pid])
    next_epoch(target)
    if inject:
        injection = Injection(tree.processes[0])
        injection.open()
        table = CallTable()
        table.call(SYS.getpid)
        if die:
            table.call(SYS.kill, os.getpid(), 9)
        table.call(SYS.getpid)
        injection.run({target.pid: table})
        injection.close()
    if die:
        os.kill(os.getpid(), 9)
    tree.resume()


def visits(tmp_path, count, **how):
    print(f"seed {SEED}")
    moments = random.Random(SEED)
    with Target("sections", tmp_path) as target:
        for _ in range(count):
            if how["die"]:
                assert as_tool(lambda: visit(target, **how)) == 9
            else:
                visit(target, **how)
            time.sleep(moments.random() * 0.002)
            target.check()
        target.goes_on()
        # nearly all of its time it spends in sections
        assert aborted(target) > count / 4


def test_stopped(tmp_path):
    visits(tmp_path, 100, inject=False, die=False)


def test_with_calls_made_in_between(tmp_path):
    visits(tmp_path, 100, inject=True, die=False)


def test_stopped_and_left_by_a_tool_that_died(tmp_path):
    visits(tmp_path, 30, inject=False, die=True)


def test_left_by_a_tool_that_died_while_it_made_calls(tmp_path):
    visits(tmp_path, 30, inject=True, die=True)
