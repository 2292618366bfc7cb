"""What the check says of state that cannot be moved: by name, from outside, while the process runs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from state_moves import running

from checkpoint import procfs
from checkpoint.errors import AlreadyTraced, NoSuchProcess
from checkpoint.namespaces import verdicts as namespaces
from checkpoint.preflight import check
from checkpoint.state import preflight
from checkpoint.state.preflight import verdicts
from checkpoint.tracee import Tree
from checkpoint.verdict import Status, Verdict, refusals

HEAD = "import ctypes, os, sys, threading, time; libc = ctypes.CDLL(None, use_errno=True)\n"
WAIT = "\nos.write(1, b'ready\\n')\nwhile True: time.sleep(100)\n"


def python(source: str, *args: object) -> tuple[object, ...]:
    return (sys.executable, "-Ic", HEAD + source + WAIT, *args)


def refused(found: list[Verdict]) -> list[tuple[str, str]]:
    """(code, kind) of what is refused; every refusal says what to do and names the process."""
    bad = [verdict for verdict in found if verdict.status is Status.REFUSE]
    assert all(verdict.fix and verdict.text and verdict.subject.startswith("pid ") for verdict in bad)
    return [(verdict.code, verdict.kind) for verdict in bad]


def test_an_ordinary_process_is_fine():
    with running(*python("")) as pid:
        assert verdicts(pid) == [Verdict(subject=f"pid {pid}", kind="state")]


def test_a_process_that_has_gone():
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(NoSuchProcess):
        verdicts(process.pid)


def judged(*roots: int, members: Sequence[int] = ()) -> list[Verdict]:
    """On the namespaces of trees, which may have more members than we know."""
    return namespaces.verdicts(roots, [*roots, *members])


def test_a_user_namespace_without_ids() -> None:
    with running(*python("assert libc.unshare(0x10000000) == 0")) as pid:
        assert refused(judged(pid)) == [("TM-0810", "user namespace")]


@pytest.mark.parametrize(
    ("name", "flag"), [("uts", 0x4000000), ("ipc", 0x8000000), ("net", 0x40000000), ("cgroup", 0x2000000)]
)
def test_a_namespace_that_is_made_anew(name: str, flag: int) -> None:
    with running(*python(f"assert libc.unshare({flag}) == 0")) as pid:
        (verdict,) = judged(pid)
    assert (verdict.status, verdict.kind) == (Status.OK, f"{name} namespace")


@pytest.mark.parametrize(("name", "flag"), [("pid", 0x20000000), ("time", 0x80)])
def test_children_that_would_be_in_another_namespace(name: str, flag: int) -> None:
    with running(*python(f"assert libc.unshare({flag}) == 0")) as pid:
        assert refused(judged(pid)) == [("TM-0720", f"{name} namespace")]


def test_a_process_with_other_clocks_than_its_trees_root():
    # the namespace is entered by exec
    with running("sh", "-c", 'unshare --time "$@" & wait', "sh", *python("")) as root:
        _, child = procfs.tree(root)
        try:
            assert refused(judged(root, members=[child])) == [("TM-0720", "time namespace")]
        finally:
            os.kill(child, signal.SIGKILL)


UNSHARED_THREAD = """
def work():
    assert libc.unshare({flag}) == 0
    done.set()
    time.sleep(1000)
done = threading.Event()
threading.Thread(target=work, daemon=True).start()
done.wait()
"""


def test_a_thread_with_descriptors_of_its_own() -> None:
    with running(*python(UNSHARED_THREAD.format(flag=0x400))) as pid:
        found = verdicts(pid)
        assert refused(found) == [("TM-0321", "unshared descriptors")]
        assert " thread " in found[0].subject


def test_a_thread_with_directories_of_its_own() -> None:
    with running(*python(UNSHARED_THREAD.format(flag=0x200))) as pid:
        assert refused(verdicts(pid)) == []


CLONED = """
CLONE = 56
pid = libc.syscall(CLONE, {flag} | 17, 0, 0, 0, 0)
if pid == 0:
    while True: time.sleep(100)
assert pid > 0
import atexit, signal
def end(*_):
    os.kill(pid, 9); os._exit(0)
signal.signal(15, end)
"""


@pytest.mark.parametrize(("flag", "what"), [(0x400, "descriptors"), (0x200, "directories")])
def test_something_shared_with_another_process(flag: int, what: str) -> None:
    with running(*python(CLONED.format(flag=flag))) as pid:
        try:
            (child,) = procfs.children(pid)
            for each in (pid, child):
                assert refused(verdicts(each)) == [("TM-0320", f"shared {what}")]
                assert refused(verdicts(each, members=(pid, child))) == []
        finally:
            os.kill(child, 9)


BEHIND = """
def work():
    assert libc.unshare(0x200) == 0
    if libc.syscall(56, 0x200 | 17, 0, 0, 0, 0) == 0:
        while True: time.sleep(100)
    done.set()
    time.sleep(1000)
done = threading.Event()
threading.Thread(target=work, daemon=True).start()
done.wait()
"""


def test_directories_that_a_thread_shares_with_another_process() -> None:
    with running(*python(BEHIND)) as pid:
        (child,) = procfs.children(pid)
        try:
            for each in (pid, child):
                assert refused(verdicts(each, members=(pid, child))) == [("TM-0320", "shared directories")]
        finally:
            os.kill(child, 9)


SHARED_MEMORY = """\
#include <signal.h>
#include <sched.h>
#include <unistd.h>
static char stack[65536];
static int child(void *arg) { (void)arg; for (;;) pause(); }
int main(void)
{
	if (clone(child, stack + sizeof stack, CLONE_VM | SIGCHLD, 0) < 0)
		return 1;
	write(1, "ready\\n", 6);
	for (;;)
		pause();
}
"""


VFORK = """
#include <unistd.h>
#include <sys/wait.h>
int main(int argc, char **argv)
{
	write(1, "ready\\n", 6);
	for (;;) {
		int pid = vfork();
		if (pid == 0) {
			if (argc > 1)
				sleep(1000);
			execl("/bin/true", "true", (char *)0);
			_exit(1);
		}
		waitpid(pid, 0, 0);
	}
}
"""


def test_a_parent_in_vfork(tmp_path: Path) -> None:
    """One that starts programs all the time is in it half the time, and no reason to refuse anything."""
    source, program = tmp_path / "v.c", tmp_path / "v"
    source.write_text(VFORK)
    subprocess.run(["gcc", "-w", "-o", program, source], check=True)
    with running(program) as pid:
        assert [refused(verdicts(pid)) for _ in range(10)] == [[]] * 10
    with running(program, "stay") as pid:
        while not (children := procfs.children(pid)):
            pass
        try:
            for each in (pid, *children):
                found = verdicts(each)
                assert refused(found) == [("TM-0320", "shared memory")]
                assert "vfork" in found[0].text
        finally:
            os.kill(children[0], 9)


def test_a_debugger_at_a_child_or_at_one_thread() -> None:
    source = """
if os.fork() == 0:
    while True: time.sleep(100)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
"""
    with running(*python(source)) as pid:
        (child,) = procfs.children(pid)
        try:
            for task, name in ((child, f"pid {child}"), (procfs.threads(pid)[1], f"pid {pid} thread")):
                options = ("-f", "-q") if task == child else ("-q",)
                command = ["strace", *options, "-o", "/dev/null", "-p", str(task)]
                with subprocess.Popen(command) as strace:
                    try:
                        while procfs.read_status(task)["TracerPid"] == "0":
                            pass
                        (verdict,) = refusals(check([pid]))
                        assert (verdict.code, verdict.text.split()[-1]) == ("TM-0306", str(strace.pid))
                        assert verdict.subject.startswith(name)
                        with pytest.raises(AlreadyTraced, match=str(strace.pid)):
                            Tree.stop([pid])
                    finally:
                        strace.terminate()
            assert refusals(check([pid])) == []
        finally:
            os.kill(child, 9)


def test_memory_shared_with_another_process(tmp_path: Path) -> None:
    source, program = tmp_path / "shared.c", tmp_path / "shared"
    source.write_text("#define _GNU_SOURCE\n" + SHARED_MEMORY)
    subprocess.run(["gcc", "-w", "-o", program, source], check=True)
    with running(program) as pid:
        (child,) = procfs.children(pid)
        try:
            assert refused(verdicts(pid)) == [("TM-0320", "shared memory")]
        finally:
            os.kill(child, 9)


I386 = """\
        .globl _start
_start: movl $4, %eax           # write(1, "ready\\n", 6)
        movl $1, %ebx
        movl $text, %ecx
        movl $6, %edx
        int $0x80
1:      movl $29, %eax          # pause()
        int $0x80
        jmp 1b
        .data
text:   .ascii "ready\\n"
"""


def test_a_32_bit_program(tmp_path: Path) -> None:
    source, obj, program = (tmp_path / name for name in ("p.s", "p.o", "p"))
    source.write_text(I386)
    subprocess.run(["as", "--32", source, "-o", obj], check=True)
    subprocess.run(["ld", "-m", "elf_i386", obj, "-o", program], check=True)
    with running(program) as pid:
        assert refused(verdicts(pid)) == [("TM-0309", "program")]


def test_a_removed_working_directory(tmp_path: Path) -> None:
    with running(*python("os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')")) as pid:
        assert refused(verdicts(pid)) == [("TM-0326", "cwd")]


def test_a_worker_of_the_kernel():
    source = """
params = ctypes.create_string_buffer((0).to_bytes(8, 'little') + (2).to_bytes(4, 'little'), 120)   # IORING_SETUP_SQPOLL
assert libc.syscall(425, 4, params) >= 0
"""
    with running(*python(source)) as pid:
        assert ("TM-0324", "kernel worker") in refused(verdicts(pid))


FILTER = """
import struct
assert libc.prctl(38, 1, 0, 0, 0) == 0
text = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000), 8)
program = ctypes.create_string_buffer(struct.pack("<H6xQ", 1, ctypes.addressof(text)), 16)
assert libc.syscall(317, 1, 0, program) == 0
"""


def test_filters_can_be_read_by_a_tool_with_the_right_to():
    with running(*python(FILTER)) as pid:
        assert refused(verdicts(pid)) == []
        assert _verdicts_of_a_tool_that(pid, lambda libc: libc.prctl(0, 0, 0, 0, 0)) == []


def _verdicts_of_a_tool_that(pid: int, prepare: object) -> list[tuple[str, str]]:
    """What is refused by a process of ours that has done ``prepare(libc)`` first."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare(ctypes.CDLL(None, use_errno=True))  # type: ignore[operator]
            os.write(writing, repr(refused(verdicts(pid))).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    found: list[tuple[str, str]] = eval(text)  # our own repr
    return found


def test_filters_are_hidden_from_a_tool_with_a_filter():
    def prepare(libc: ctypes.CDLL) -> None:
        exec(FILTER, {"libc": libc, "ctypes": ctypes})

    with running(*python(FILTER)) as pid:
        assert _verdicts_of_a_tool_that(pid, prepare) == [("TM-0328", "seccomp")]


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Lines that this machine's kernel cannot show, added to every /proc/PID/status."""
    extra: dict[str, str] = {}
    real = procfs.read_status
    monkeypatch.setattr(procfs, "read_status", lambda pid, tid=None: {**real(pid, tid), **extra})
    return extra


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("x86_Thread_features", "shstk wrss", "shadow stack"), ("untag_mask", "0x7fffffffffffff", "tagged addresses")],
)
def test_features_of_other_cpus(status: dict[str, str], name: str, value: str, kind: str) -> None:
    status[name] = value
    with running(*python("")) as pid:
        assert refused(verdicts(pid)) == [("TM-0327", kind)]


def test_a_confined_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(*python("")) as pid:
        monkeypatch.setattr(preflight, "_security_label", lambda each: "web (enforce)" if each == pid else "unconfined")
        assert refused(verdicts(pid)) == [("TM-0322", "security label")]
