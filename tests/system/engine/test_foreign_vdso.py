"""A process whose vdso is another kernel's: here this kernel's own, taken for another's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from checkpoint.arch import vdso_jump
from checkpoint.errors import HandlerInVdso
from checkpoint.indoors import walk_out
from checkpoint.memory.vma import VDSO, Vma, read_maps
from checkpoint.tracee import Tree
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import TCPMIG
from tests.system.engine.target import Target

#: `tcpmig` for which every vdso is a foreign one
FOREIGN = """
from checkpoint.memory import special
special.is_foreign = lambda layout, stub: True
from cli.main import main
main()
"""
MOVES = 2
#: the program does nothing but read clocks: on a busy machine the ticks may keep it inside
ATTEMPTS = 10
READ, EXEC = 1, 4


class StandsInIt(Exception):
    """The restore was refused: at another moment no thread stands there."""


def vdso_of(pid: int) -> Vma:
    return next(vma for vma in read_maps(pid) if vma.name == VDSO)


def checkpoint(pid: int, image: Path) -> None:
    argv = [*TCPMIG, "checkpoint", str(pid), "-o", str(image)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def restore(image: Path) -> subprocess.Popen[str]:
    """It runs; the tool waits for its end."""
    argv = [sys.executable, "-c", FOREIGN, "restore", str(image), "--foreground"]
    tool = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert tool.stdout is not None
    said = tool.stdout.readline()
    if said.startswith(HandlerInVdso.code):
        with tool:
            raise StandsInIt(said)
    assert said.strip().isdigit(), said + tool.stdout.read()
    return tool


def goes_on(target: Target) -> None:
    """Its clocks run, and not backwards. (Rebuilt, it is no child of ours any more.)"""
    before, end = target.progress, time.monotonic() + 20
    while target.progress < before + 1000:
        assert time.monotonic() < end, "it stands still"
        time.sleep(0.001)
    assert target.read()[1] == 0


def test_its_functions_lead_to_those_of_this_kernel_and_it_can_move_on(tmp_path: Path) -> None:
    for number in range(ATTEMPTS):
        try:
            (folder := tmp_path / str(number)).mkdir()
            move_on(folder)
        except StandsInIt as error:
            print(f"try again, as it says: {error}")
        else:
            return
    raise AssertionError(f"{ATTEMPTS} times a thread stood in it")


def move_on(tmp_path: Path) -> None:
    with Target("clocks", tmp_path) as target:
        pid, vdsos = target.pid, [vdso_of(target.pid)]
        parents: list[subprocess.Popen[str]] = []
        try:
            for number in range(MOVES):
                image = tmp_path / f"image{number}"
                checkpoint(pid, image)
                (parents[-1] if parents else target.process).wait(20)
                parents.append(restore(image))
                vdsos.append(vdso_of(pid))
                goes_on(target)
            # each is still there, as memory of the process's own that leads on to the next
            places = {vma.start: vma for vma in read_maps(pid)}
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
            for vdso in vdsos[:-1]:
                old = places[vdso.start]
                assert (old.name, old.prot, old.size) == ("", READ | EXEC, vdso.size)
                assert vdso_jump(0)[:6] in os.pread(memory, old.size, old.start)
            os.close(memory)
            assert len({vdso.start for vdso in vdsos}) == MOVES + 1
        finally:
            if parents and parents[-1].poll() is None:
                os.kill(pid, signal.SIGKILL)
                parents[-1].wait(20)
            for tool in parents:
                if tool.stdout is not None:
                    tool.stdout.close()


def test_threads_that_stand_in_it_walk_out(tmp_path: Path) -> None:
    out = 0
    with Target("clocks", tmp_path) as target:
        place = vdso_of(target.pid)
        for number in range(200):
            time.sleep(random.Random(number).uniform(0, 0.002))
            tree = Tree.stop([target.pid])
            try:
                (process,) = tree.processes
                inside = [thread for thread in process.threads if place.start <= thread.registers.ip < place.end]
                walk_out(process)
                # one that the clock's ticks keep inside stays there; most do not
                out += sum(not place.start <= thread.registers.ip < place.end for thread in inside)
                for thread in process.threads:
                    assert thread.registers == thread.get_registers()
            finally:
                tree.resume()
            target.goes_on()
            if out > 3:
                return
    raise AssertionError(f"of all that stood in it only {out} came out")


def stopped_in_handler(tmp_path: Path, how: str, image: Path) -> Target:
    """An image of a program whose handler runs; it has ended."""
    with Target("handler", tmp_path, how) as target:
        os.kill(target.pid, signal.SIGUSR1)
        end = time.monotonic() + 20
        while not target.read()[1]:
            assert target.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        checkpoint(target.pid, image)
        target.process.wait(20)
    return target


def test_a_handler_that_will_return_into_it_is_refused(tmp_path: Path) -> None:
    for number in range(10):  # where it has interrupted the program is chance, mostly in the vdso
        stopped_in_handler(tmp_path, "asks", image := tmp_path / f"image{number}")
        argv = [sys.executable, "-c", FOREIGN, "restore", str(image), "--foreground"]
        with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
            assert tool.stdout is not None
            assert tool.stderr is not None
            said = tool.stdout.readline().strip()
            if not said:
                assert "TM-0740" in tool.stderr.read()
                return
            os.kill(int(said), signal.SIGKILL)
        (tmp_path / "handler.words").unlink()
    raise AssertionError("it was never refused")


def test_a_handler_that_will_return_elsewhere_is_not(tmp_path: Path) -> None:
    target = stopped_in_handler(tmp_path, "counts", image := tmp_path / "image")
    with restore(image) as tool:
        try:
            here, end = target.progress, time.monotonic() + 20
            os.kill(target.pid, signal.SIGUSR2)
            while target.progress == here:
                assert time.monotonic() < end
                time.sleep(0.001)
        finally:
            os.kill(target.pid, signal.SIGKILL)
            tool.wait(20)
