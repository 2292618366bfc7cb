"""Who holds a file outside of a tree: not a child that was born since the tree was listed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from checkpoint.files.table import FileTable

PROGRAM = """
import os, sys
r, w = os.pipe()
child = os.fork()
if child:
    print(child, flush=True)
os.read(0, 1)
"""


@dataclass(frozen=True)
class Owner:
    pid: int


def holders(*listed: int, pipe: str) -> set[int]:
    with FileTable(live=True) as table:
        for pid in listed:
            table.add_process(Owner(pid))
        return {pid for pid, _ in table.outside.holders(pipe)}


def test_a_child_that_is_not_listed_yet_is_not_outside() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-ISc", PROGRAM], **pipes) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        pipe = os.readlink(f"/proc/{parent.pid}/fd/3")
        try:
            assert holders(parent.pid, pipe=pipe) == set()
            assert holders(parent.pid, child, pipe=pipe) == set()
            # but its parent is: a tree is what begins at the process that was named
            assert holders(child, pipe=pipe) == {parent.pid}
        finally:
            parent.kill()
            os.kill(child, 9)
