"""The root of a tree of cases: forks a process for each, tells when one has died, and waits.

python -S runner.py CONTROL FOLDER PROGRAMS CASE...
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.system.state import spaces
from tests.system.state.case import Case, Here, load
from tests.system.state.control import DIED, FAILED, GO, PASSED, QUIT, READY, Control

PAUSE = 0.002


def serve(case: Case, control: Control, here: Here) -> None:
    """In the process of one case: set up, wait, verify."""
    try:
        program = case.program(here)
        next(program)
        control.say(here.slot, READY)
        while control.order not in (GO, QUIT):
            time.sleep(PAUSE)
        if control.order == GO:
            next(program, None)
            control.say(here.slot, PASSED)
    except BaseException:
        control.say(here.slot, FAILED, traceback.format_exc())
    # what it has is kept until the test has looked
    while control.order != QUIT:
        time.sleep(PAUSE)


def main() -> None:
    path, folder, programs = map(Path, sys.argv[1:4])
    cases = [load(name) for name in sys.argv[4:]]
    control = Control(path)
    if any(case.spaces for case in cases):
        spaces.enter(max(case.spaces for case in cases))
    children = {}
    for slot, case in enumerate(cases):
        here = Here(folder / str(slot), programs, path, slot)
        here.folder.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                serve(case, control, here)
            finally:
                os._exit(0)
        children[pid] = slot
    while control.order != QUIT:
        time.sleep(PAUSE)
        pid, status = os.waitpid(-1, os.WNOHANG) if children else (0, 0)
        if pid in children:
            slot = children.pop(pid)
            if control.state(slot) not in (PASSED, FAILED):
                control.say(slot, DIED, f"{cases[slot].name} ended with wait status {status:#x}")


main()
