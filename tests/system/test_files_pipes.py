"""Pipes and FIFOs, set up by one process, captured, rebuilt, given to another process and tried there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint.errors import PeerOutsideTree
from checkpoint.files.rebuild import Rebuilder
from tests.system.files_children import children
from tests.system.files_essence import captured, same


def test_pipe_with_content_and_several_descriptions() -> None:
    same(
        """
r, w = os.pipe2(os.O_CLOEXEC)
fcntl.fcntl(w, 1031, 1 << 18)
w2 = os.open('/proc/self/fd/%d' % w, os.O_WRONLY | os.O_NONBLOCK)
both = os.open('/proc/self/fd/%d' % r, os.O_RDWR)
for i in range(50): os.write(w, b'%03d' % i * 1000)
os.set_blocking(r, False)
keep.update(r=r, w=w, w2=w2)
""",
        """
r = keep['r']
assert os.read(r, 200000) == b''.join(b'%03d' % i * 1000 for i in range(50))
assert fcntl.fcntl(r, 1032) == 1 << 18
os.write(keep['w2'], b'z'); assert os.read(r, 9) == b'z'
assert os.get_blocking(keep['w']) and not os.get_blocking(keep['w2']) and not os.get_blocking(r)
""",
    )


def test_pipe_of_packets_keeps_their_borders() -> None:
    same(
        """
r, w = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
for part in (b'one', b'three', b'x' * 4096): os.write(w, part)
keep.update(r=r, w=w)
""",
        """
assert [os.read(keep['r'], 9999) for _ in range(3)] == [b'one', b'three', b'x' * 4096]
os.write(keep['w'], b'a'); os.write(keep['w'], b'b'); assert os.read(keep['r'], 9) == b'a'
""",
    )


@pytest.mark.parametrize("end", ["r", "w"])
def test_half_closed_pipe(end: str) -> None:
    same(
        f"r, w = os.pipe(); os.write(w, b'rest'); os.close({'w' if end == 'r' else 'r'}); keep['fd'] = {end}",
        """
assert os.read(keep['fd'], 9) == b'rest' and os.read(keep['fd'], 9) == b''
"""
        if end == "r"
        else """
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
try: os.write(keep['fd'], b'x')
except BrokenPipeError: pass
else: raise AssertionError('there is a reader')
""",
    )


def test_pipe_that_leaves_the_tree_is_refused_except_as_a_standard_stream() -> None:
    read_end, write_end = os.pipe()
    try:
        with children(1) as (source,):
            source.do(f"os.dup2({write_end}, 1); os.closerange(3, 4096)")
            source.stop()
            records = captured(source.pid)
            index, _ = records.tables[source.pid][1]
            assert type(records.files[index]).__name__ == "External"
        with children(1) as (source,):
            source.do(f"os.dup2({write_end}, 100); os.closerange(3, 100); os.closerange(101, 4096)")
            source.stop()
            with pytest.raises(PeerOutsideTree, match="fd 100"):
                captured(source.pid)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_standard_stream_to_a_terminal_becomes_null() -> None:
    master, slave = os.openpty()
    try:
        with children() as (source, target):
            source.do(f"os.dup2({slave}, 0); os.dup2({slave}, 1); os.dup2({slave}, 2); os.closerange(3, 4096)")
            source.stop()
            records = captured(source.pid)
            warnings: list[str] = []
            rebuilder = Rebuilder(records, warn=warnings.append)
            rebuilder.rebuild()
            from checkpoint.files.install import install

            install(rebuilder, source.pid, target)
            rebuilder.close()
            target.do("assert [os.readlink('/proc/self/fd/%d' % i) for i in range(3)] == ['/dev/null'] * 3")
            assert any("/dev/pts/" in warning for warning in warnings)
    finally:
        os.close(master)
        os.close(slave)


def test_fifo(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    same(
        f"""
r = os.open({path!r}, os.O_RDONLY | os.O_NONBLOCK); w = os.open({path!r}, os.O_WRONLY)
os.write(w, b'queued'); keep.update(r=r, w=w)
""",
        """
assert os.read(keep['r'], 99) == b'queued'
os.close(keep['w']); assert os.read(keep['r'], 9) == b''
""",
    )
