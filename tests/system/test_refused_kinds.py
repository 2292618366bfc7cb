"""What cannot be moved is refused by name, before anything is stopped: one program for each."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from state_moves import running

from checkpoint import preflight
from checkpoint.errors import ForeignMode
from checkpoint.kernel import corked
from checkpoint.procfs import read_stat
from checkpoint.tracee import Tree
from checkpoint.verdict import Status
from tcpstate.errors import KernelFeatureMissing
from tests.tscnet import wait_until

HEAD = """
import ctypes, mmap, os, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def pages(count=1, prot=3, flags=0x22, fd=-1):
    return call(9, 0, count * 4096, prot, flags, fd, 0)
"""
WAIT = "\nos.write(1, b'ready\\n')\nwhile True: time.sleep(100)\n"

USERFAULTFD = """
fd = call(323, 0o2000000 | 1)
call(16, fd, 0xC018AA3F, ctypes.create_string_buffer(struct.pack("<QQQ", 0xAA, 0, 0), 24))
"""
#: prctl, write and read without a lock of Python's between them: futex would be its end
STRICT = """
r, w = os.pipe()
lib, room = ctypes.PyDLL(None), ctypes.create_string_buffer(1)
prctl, write, read = lib.prctl, lib.write, lib.read
prctl(22, 1), write(1, b"ready\\n", 6), read(r, room, 1)
"""
AIO = """
context = ctypes.c_ulong(0)
call(206, 400, ctypes.byref(context))
"""
#: a request that is done when there is something in an empty pipe
AIO_POLL = (
    AIO
    + """
r, w = os.pipe()
request = ctypes.create_string_buffer(struct.pack("=QIIHhIQQqQII", 1, 0, 0, 5, 0, r, 1, 0, 0, 0, 0, 0), 64)
call(209, context.value, 1, (ctypes.c_ulong * 1)(ctypes.addressof(request)))
"""
)
#: (what it is, code, a word of the verdict's text, the program)
KINDS = (
    ("io_uring", "TM-0340", "io_uring", "call(425, 4, ctypes.create_string_buffer(120))"),
    ("userfaultfd", "TM-0340", "userfaultfd", USERFAULTFD),
    (
        "memory registered with userfaultfd",
        "TM-0374",
        "registered",
        USERFAULTFD
        + "call(16, fd, 0xC020AA00, ctypes.create_string_buffer(struct.pack('<QQQQ', pages(), 4096, 1, 0), 32))",
    ),
    ("a request that waits in an AIO context", "TM-0776", "wait for files", AIO_POLL),
    ("a parent's AIO context", "TM-0375", "another process's", AIO + "os.fork() or call(157, 1, 9)"),
    (
        "a part of the ring of an AIO context",
        "TM-0375",
        "not mapped",
        AIO + "call(11, context.value + 4096, 4096)",
    ),
    ("a protected ring of an AIO context", "TM-0375", "not mapped", AIO + "call(10, context, 4096, 1)"),
    ("sealed memory", "TM-0377", "sealed", "call(462, pages(), 4096, 0)"),
    (
        "a perf event",
        "TM-0340",
        "perf event",
        "call(298, struct.pack('<IIQ', 1, 128, 0).ljust(128, b'\\0'), 0, -1, -1, 0)",
    ),
    ("a BPF map", "TM-0340", "BPF", "call(321, 0, struct.pack('<IIII', 2, 4, 4, 1).ljust(72, b'\\0'), 72)"),
    (
        "a raw packet that is not finished",
        "TM-0340",
        "not finished",
        "import socket; s = socket.socket(2, 3, 253); s.sendto(b'half', socket.MSG_MORE, ('127.0.0.1', 0))",
    ),
    (
        "a datagram that is not finished, with options of its own",
        "TM-0340",
        "not finished",
        "import socket; s = socket.socket(2, 2); s.setsockopt(0, 4, b'\\1\\1\\1\\0'); "
        "s.sendto(b'half', socket.MSG_MORE, ('127.0.0.1', 9))",
    ),
    (
        "fanotify that is asked for permission",
        "TM-0340",
        "permission",
        "call(300, 4, 0)",
    ),
    (
        "fanotify events that nobody reads",
        "TM-0340",
        "wait to be read",
        "fd = call(300, 0, 0); call(301, fd, 1, 0x20, -100, b'/etc/hostname'); open('/etc/hostname').close()",
    ),
    ("a namespace", "TM-0340", "namespace", "os.open('/proc/self/ns/net', os.O_RDONLY)"),
    ("a file of another process", "TM-0341", "process 1", "os.open('/proc/1/status', os.O_RDONLY)"),
    ("frames of memory", "TM-0340", "pagemap", "os.open('/proc/self/pagemap', os.O_RDONLY)"),
    ("memory opened for writing", "TM-0340", "for writing", "os.open('/proc/thread-self/mem', os.O_RDWR)"),
    ("what a descriptor is", "TM-0340", "each who opens it", "os.open('/proc/self/fdinfo/0', os.O_RDONLY)"),
    (
        "a file of a process that has ended",
        "TM-0340",
        "has ended",
        "pid = os.fork() or os._exit(0); fd = os.open(f'/proc/{pid}/stat', 0); os.waitpid(pid, 0)",
    ),
    ("secret memory", "TM-0340", "secret memory", "fd = call(447, 0)"),
    (
        "secret memory that is mapped",
        "TM-0373",
        "secret memory",
        "fd = call(447, 0); os.ftruncate(fd, 4096); pages(flags=1, fd=fd); os.close(fd)",
    ),
    ("a device", "TM-0340", "device", "os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)"),
    (
        "a POSIX message queue",
        "TM-0340",
        "message queue",
        "call(240, b'tcpmig-refused', 0o102, 0o600, 0); call(241, b'tcpmig-refused')",
    ),
    (
        "strict seccomp",
        "TM-0310",
        "strict",
        STRICT,
    ),
)


def python(source: str) -> tuple[object, ...]:
    return (sys.executable, "-ISc", HEAD + source + WAIT)


def told(pid: int) -> list[tuple[str, str]]:
    bad = [verdict for verdict in preflight.check([pid]) if verdict.status is Status.REFUSE]
    assert all(verdict.fix for verdict in bad)
    return [(verdict.code, verdict.text) for verdict in bad]


@pytest.mark.parametrize(("code", "word", "program"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
def test_refused(code: str, word: str, program: str) -> None:
    with running(*python(program)) as pid:
        found = told(pid)
    assert [each for each, text in found if word in text] == [code], found


def test_a_datagram_that_is_not_finished_where_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise KernelFeatureMissing("no BPF here")

    monkeypatch.setattr(corked, "pending", refused)
    source = "import socket; s = socket.socket(2, 2); s.connect(('127.0.0.1', 9)); s.send(b'half', socket.MSG_MORE)"
    with running(*python(source)) as pid:
        found = told(pid)
    assert [(code, "not finished" in text, "no BPF here" in text) for code, text in found] == [("TM-0340", True, True)]


#: a program for i386 that waits for a signal: pause by int $0x80
_WAITS_IN_32_BITS = bytes.fromhex("b81d000000 cd80 ebf7")


def test_a_32_bit_program(tmp_path: Path) -> None:
    size = 84 + len(_WAITS_IN_32_BITS)
    head = b"\x7fELF\x01\x01\x01" + bytes(9)
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    head += struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, size, size, 5, 4096)
    program = tmp_path / "small"
    program.write_bytes(head + _WAITS_IN_32_BITS)
    program.chmod(0o755)
    with subprocess.Popen([program]) as process:
        try:
            wait_until(lambda: read_stat(process.pid).state == "S")
            found = told(process.pid)
            assert ("TM-0309", "its program is not a 64-bit one") in found, found
            before = read_stat(process.pid).start_time
            with pytest.raises(ForeignMode):
                Tree.stop([process.pid])
            # it goes on as it did
            wait_until(lambda: read_stat(process.pid).state == "S")
            assert read_stat(process.pid).start_time == before
        finally:
            process.kill()


@pytest.fixture
def traced() -> Iterator[int]:
    """A process that another one of ours traces, as a debugger would."""
    with running(*python("")) as pid:
        debugger = subprocess.Popen(
            [sys.executable, "-ISc", HEAD + f"call(101, 0x4206, {pid}, 0, 0)" + WAIT], stdout=subprocess.PIPE
        )
        assert debugger.stdout is not None
        assert debugger.stdout.readline() == b"ready\n"
        try:
            yield pid
        finally:
            os.kill(debugger.pid, signal.SIGKILL)
            debugger.wait()
            debugger.stdout.close()


def test_a_debugger_is_attached(traced: int) -> None:
    ((code, text),) = told(traced)
    assert code == "TM-0306"
    assert "traced" in text
