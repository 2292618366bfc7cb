"""Open files of several processes: shared, mapped, judged before the stop; and what stands in the way."""

from __future__ import annotations

import dataclasses
import mmap
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from checkpoint.errors import BadFileRecord, SharedDescriptors, UnsupportedMapping
from checkpoint.files.base import OpenFile
from checkpoint.files.install import install
from checkpoint.files.pipe import Pipe
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.regular import DeletedFile, RegularFile, SharedMemory
from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.files.verdicts import foretell, judge_here, verdicts
from checkpoint.memory.vma import read_maps
from checkpoint.verdict import Status
from tcpstate import codec
from tests.system.files_children import _Pid, capture, children


@dataclasses.dataclass(frozen=True)
class Foreseen:
    files: list[OpenFile]


FORK = """
def fork(code):
    pid = os.fork()
    if pid == 0:
        try: exec(code, globals())
        finally:
            while True: time.sleep(9)
    return pid
"""


def grandchild(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while " T " not in Path(f"/proc/{pid}/stat").read_text():
        pass


def test_descriptions_shared_by_two_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with children(3) as (source, one, two):
        source.bare()
        keep = source.do(
            FORK
            + f"""
f = os.open({str(tmp_path / "file")!r}, os.O_RDONLY)
r, w = os.pipe()
e = select.epoll(); e.register(r, 1)
keep['child'] = fork("os.close(w); os.dup2(f, 50); os.close(f)")
os.close(r); time.sleep(0.2); keep.update(f=f, r=r, w=w, e=e.fileno())
"""
        )
        source.stop()
        grandchild(keep["child"])
        try:
            table, records = capture(source.pid, keep["child"])
            table.close()
        finally:
            os.kill(keep["child"], signal.SIGKILL)
        assert len(records.files) == 7  # three times null, file, two ends, epoll
        parent = source.pid
        source.end()
        rebuilder = Rebuilder(records)
        rebuilder.rebuild()
        install(rebuilder, parent, one)
        install(rebuilder, keep["child"], two)
        rebuilder.complete()
        rebuilder.release()
        rebuilder.close()
        one.do("assert os.read(keep['f'], 4) == b'0123'; os.write(keep['w'], b'hello')", keep)
        two.do(
            """
assert os.read(50, 9) == b'456789'
assert [fd for fd, _ in select.epoll.fromfd(os.dup(keep['e'])).poll(0)] == [keep['r']]
assert os.read(keep['r'], 9) == b'hello'
try: os.fstat(keep['f']); raise AssertionError('it should be closed')
except OSError: pass
""",
            keep,
        )
        one.do("os.close(keep['w'])")
        two.do("assert os.read(keep['r'], 9) == b''")


def test_low_limit_of_descriptors_and_high_numbers() -> None:
    with children() as (source, target):
        source.bare()
        source.do(
            """
import resource
os.dup2(0, 900); resource.setrlimit(resource.RLIMIT_NOFILE, (20, 4096)); keep['n'] = 900
"""
        )
        source.stop()
        table, records = capture(source.pid)
        table.close()
        target.do("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))")
        rebuilder = Rebuilder(records)
        rebuilder.rebuild()
        install(rebuilder, source.pid, target)
        rebuilder.close()
        target.do(
            "assert os.readlink('/proc/self/fd/900') == '/dev/null'; assert len(os.listdir('/proc/self/fd')) == 5"
        )


def test_files_behind_mappings(tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(b"s" * 8192)
    (tmp_path / "gone").write_bytes(b"g" * 5000)
    with children(1) as (source,):
        source.bare()
        keep = source.do(
            f"""
def at(m): return ctypes.addressof(ctypes.c_char.from_buffer(m))
f = os.open({str(tmp_path / "shared")!r}, os.O_RDWR); rw = mmap.mmap(f, 0); os.close(f)
f = os.open({str(tmp_path / "gone")!r}, os.O_RDWR); gone = mmap.mmap(f, 0, flags=mmap.MAP_PRIVATE); os.close(f)
os.unlink({str(tmp_path / "gone")!r})
anon = mmap.mmap(-1, 1 << 20); anon[5000:5005] = b'inner'
fd = os.memfd_create('both'); os.write(fd, b'm' * 4096); both = mmap.mmap(fd, 4096)
keep.update(rw=at(rw), gone=at(gone), anon=at(anon), both=at(both), fd=fd)
"""
        )
        source.stop()
        maps = {vma.start: vma for vma in read_maps(source.pid)}

        def holding(address: int) -> object:
            return next(vma for vma in maps.values() if vma.start <= address < vma.end)

        with FileTable() as table:
            table.add_process(_Pid(source.pid))
            index = {k: table.add_mapped(_Pid(source.pid), holding(keep[k])) for k in ("rw", "gone", "anon", "both")}  # type: ignore[arg-type]
            assert index["rw"] == table.add_mapped(_Pid(source.pid), holding(keep["rw"]))  # type: ignore[arg-type]
            records = table.records()
            runs = [
                [(r, table.contents.read(i, *r)) for r in table.contents.runs(i)] for i in range(len(table.contents))
            ]
        kinds = {k: records.files[i] for k, i in index.items()}
        shared, gone, anon, both = kinds["rw"], kinds["gone"], kinds["anon"], kinds["both"]
        assert isinstance(shared, RegularFile)
        assert shared.access.writes
        assert isinstance(gone, DeletedFile)
        assert isinstance(anon, SharedMemory)
        # the memfd's mapping and its descriptor lead to one content
        assert both.content == records.files[records.tables[source.pid][keep["fd"]][0]].content  # type: ignore[attr-defined]
    rebuilder = Rebuilder(records)
    rebuilder.rebuild()
    for i, parts in enumerate(runs):
        for run, data in parts:
            rebuilder.write_content(i, [run], data)
    rebuilder.complete()
    assert sum(length for (_, length), _ in runs[anon.content]) <= 3 * mmap.PAGESIZE
    with mmap.mmap(rebuilder.descriptor(index["anon"]), 1 << 20) as area:
        assert area[5000:5005] == b"inner"
        assert area[: 1 << 12] == bytes(1 << 12)
    assert os.readlink(f"/proc/self/fd/{rebuilder.descriptor(index['anon'])}") == "/dev/zero (deleted)"
    assert os.pread(rebuilder.descriptor(index["gone"]), 9999, 0) == b"g" * 5000
    rebuilder.close()


def test_neighbours_of_one_file_are_one_entry_and_neighbours_of_two_files_are_two(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name[:1].encode() * 8192)
    with children(1) as (source,):
        source.bare()
        keep = source.do(
            f"""
mmap_ = ctypes.CDLL(None).mmap; mmap_.restype = ctypes.c_void_p
mmap_.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
at = mmap_(None, 5 * 4096, 0, 0x22, -1, 0)
first = os.open({str(tmp_path / "first")!r}, os.O_RDWR); second = os.open({str(tmp_path / "second")!r}, os.O_RDWR)
for place, fd, how, prot, offset in (
    (0, first, 0x12, 1, 0), (1, first, 0x12, 3, 4096), (2, second, 0x12, 1, 0), (3, first, 0x12, 1, 0),
    (4, first, 0x11, 1, 4096),
):
    assert mmap_(at + place * 4096, 4096, prot, how, fd, offset) == at + place * 4096
os.close(first); os.close(second)
keep['at'] = at
"""
        )
        source.stop()
        vmas = [vma for vma in read_maps(source.pid) if keep["at"] <= vma.start < keep["at"] + 5 * 4096]
        with FileTable() as table:
            found = [table.add_mapped(_Pid(source.pid), vma) for vma in vmas]
            links = [table.entries[index].link.rpartition("/")[2] for index in found]
        assert links == ["first", "first", "second", "first", "first"]
        # the last is shared and may become writable: another way of being open
        assert found == [found[0], found[0], found[2], found[0], found[4]]
        assert len(set(found)) == 3


def test_mapping_of_a_ring_is_refused() -> None:
    with children(1) as (source,):
        source.bare()
        keep = source.do(
            """
context = ctypes.c_ulong(); assert ctypes.CDLL(None).syscall(206, 8, ctypes.byref(context)) == 0   # io_setup
keep['at'] = context.value
"""
        )
        source.stop()
        with FileTable() as table:
            vma = next(vma for vma in read_maps(source.pid) if vma.start == keep["at"])
            with pytest.raises(UnsupportedMapping):
                table.add_mapped(_Pid(source.pid), vma)


def test_verdicts_name_every_descriptor_and_disturb_nothing(tmp_path: Path) -> None:
    a, b = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    with a, b, listener, children(1) as (source,):
        source.do(
            f"os.dup2({b.fileno()}, 101); os.dup2({listener.fileno()}, 102); "
            "os.closerange(0, 101); os.closerange(103, 4096); [os.open('/dev/null', os.O_RDWR) for _ in range(3)]"
        )
        b.close()
        keep = source.do(
            f"""
x, y = socket.socketpair(); x.send(b'queued')
keep.update(x=x.fileno(), y=y.fileno(), e=os.eventfd(5), p=os.open('/proc/self/ns/net', os.O_RDONLY),
            f=os.open({str(tmp_path)!r}, os.O_RDONLY), n=ctypes.CDLL(None).syscall(323, os.O_CLOEXEC))
"""
        )
        found = {v.subject: v for v in verdicts([source.pid])}
        name = f"pid {source.pid} fd"
        assert set(found) == {f"{name} {n}" for n in [0, 1, 2, 101, 102, *keep.values()]}
        assert {s for s, v in found.items() if v.status is Status.OK} == {
            f"{name} {n}" for n in [0, 1, 2, keep["x"], keep["y"], keep["e"], keep["f"]]
        }
        assert found[f"{name} 101"].code == "TM-0341"
        assert found[f"{name} 102"].code == "TM-0342"
        assert found[f"{name} {keep['p']}"].code == "TM-0340"
        assert "userfaultfd" in found[f"{name} {keep['n']}"].text
        source.do(
            "assert y.recv(99) == b'queued' and y.getsockopt(1, 42) == -1 and os.eventfd_read(keep['e']) == 5", keep
        )


def test_what_the_target_lacks_is_told_before_the_stop(tmp_path: Path) -> None:
    for name in ("open", "mapped", "written"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    with children(1) as (source,):
        source.bare()
        keep = source.do(
            f"""
a = os.open({str(tmp_path / "open")!r}, os.O_RDONLY); d = os.open({str(tmp_path)!r}, os.O_RDONLY)
f = os.open({str(tmp_path / "mapped")!r}, os.O_RDONLY); m = mmap.mmap(f, 0, prot=mmap.PROT_READ); os.close(f)
w = os.open({str(tmp_path / "written")!r}, os.O_WRONLY)
l = socket.create_server(('127.0.0.1', 0)); keep['port'] = l.getsockname()[1]
"""
        )
        foreseen = codec.unpack(Foreseen, codec.pack(Foreseen(files=foretell([source.pid]))))

        def refused() -> set[tuple[str, str]]:
            found = judge_here(foreseen.files)
            return {(v.code, v.subject) for v in found if v.status is Status.REFUSE}

        # the listener is still there, on the same host
        assert refused() == {("TM-0552", f"127.0.0.1:{keep['port']}")}
        source.do("l.close()")
        assert refused() == set()
        (tmp_path / "mapped").unlink()
        (tmp_path / "open").write_bytes(b"x")
        (tmp_path / "written").unlink()
        (tmp_path / "other").write_bytes(b"y" * 5000)
        (tmp_path / "other").rename(tmp_path / "written")
        assert {(code, Path(name).name) for code, name in refused()} == {
            ("TM-0345", "mapped"),
            ("TM-0346", "open"),
            ("TM-0346", "written"),
        }


def test_mptcp_is_refused_by_name() -> None:
    with children(1) as (source,):
        source.bare()
        keep = source.do("keep['m'] = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).detach()")
        (verdict,) = [v for v in verdicts([source.pid]) if v.subject.endswith(f"fd {keep['m']}")]
        assert verdict.code == "TM-0343"
        assert "Multipath TCP" in verdict.text


def test_processes_that_share_a_descriptor_table_are_refused() -> None:
    with children(1) as (source,):
        source.bare()
        keep = source.do(
            """
import threading
def own(): ctypes.CDLL(None).unshare(0x400); time.sleep(60)
threading.Thread(target=own, daemon=True).start(); time.sleep(0.2)
"""
        )
        assert keep == {}
        with FileTable(live=True) as table, pytest.raises(SharedDescriptors):
            table.add_process(_Pid(source.pid))
        assert [v.code for v in verdicts([source.pid]) if v.status is Status.REFUSE] == ["TM-0349"]


def test_hostile_records() -> None:
    pipe = Pipe(flags=0, pipe=1, size=65536, queue=None)
    with pytest.raises(ValueError, match="leads to file 1 of 1"):
        TreeFiles(files=[pipe], contents=[], tables={1: {0: (1, False)}})
    from checkpoint.files.memfd import Memfd

    rebuilder = Rebuilder(TreeFiles(files=[Memfd(flags=2, content=3)], contents=[], tables={}))
    with pytest.raises(BadFileRecord):
        rebuilder.rebuild()
    rebuilder = Rebuilder(TreeFiles(files=[pipe], contents=[], tables={}))
    rebuilder.rebuild()
    with pytest.raises(BadFileRecord):
        rebuilder.take({0: Memfd(flags=2, content=0)})
    with pytest.raises(BadFileRecord):
        rebuilder.write_content(0, [(0, 1)], b"x")
    rebuilder.abort()
    assert subprocess.run(["ls", f"/proc/{os.getpid()}/fd"], capture_output=True, check=True).returncode == 0
