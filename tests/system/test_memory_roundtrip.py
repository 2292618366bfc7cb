"""A process with many kinds of mappings is captured, written to an image, and built in a stub: every byte and every
attribute is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.errors import BadLayout, OtherVdso
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.table import FileTable
from checkpoint.image.format import Kind
from checkpoint.image.inspect import describe
from checkpoint.image.reader import open_image
from checkpoint.image.writer import ImageFile
from checkpoint.inject import Injection
from checkpoint.memory import compare, layout, pages
from checkpoint.memory.layout import Mapping, MemoryLayout
from checkpoint.memory.verdicts import verdicts
from checkpoint.memory.vma import Vma, read_maps, read_smaps
from checkpoint.procfs import read_stat
from checkpoint.spawn import Stub, spawn_stub
from checkpoint.tracee import Process, Tree
from checkpoint.verdict import refusals
from tcpstate.kernel.calls import CallTable

SOURCE = Path(__file__).parent / "programs" / "mappings.c"


class SameFiles:
    """A file table for a copy on the same host: the very files, opened anew."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._index: dict[tuple[int, int, bool], int] = {}

    def add_mapped(self, process: Process, vma: Vma) -> int:
        writable = vma.shared and "mw" in vma.flags
        key = (vma.dev, vma.inode, writable)
        if key not in self._index:
            self._index[key] = len(self._fds)
            path = f"/proc/{process.pid}/map_files/{vma.start:x}-{vma.end:x}"
            self._fds.append(os.open(path, os.O_RDWR if writable else os.O_RDONLY))
        return self._index[key]

    def descriptor(self, index: int) -> int:
        return self._fds[index]

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped(pid: int) -> Iterator[Process]:
    tree = Tree.stop([pid])
    try:
        yield tree.processes[0]
    finally:
        tree.resume()


@contextmanager
def stub_for(memory: MemoryLayout) -> Iterator[Stub]:
    stub = spawn_stub(None, [(m.start, m.end) for m in memory.mappings])
    try:
        yield stub
    finally:
        stub.kill()
        stub.close()


def save(process: Process, files: SameFiles, path: Path, before: list[Vma]) -> None:
    with Injection(process) as injection:
        table = CallTable()
        brk = layout.query_brk(table)
        injection.run({process.leader.tid: table})
        memory = layout.capture(process, files, brk=brk.value, before=before, ours=injection.ranges)
    with ImageFile(path) as image:
        image.record(Kind.MAPPINGS, memory)
        image.pages(pages.read(process, memory))


def load(stub: Stub, memory: MemoryLayout, files: SameFiles, path: Path) -> None:
    layout.build(memory, stub, files.descriptor)
    with open_image(path) as image:
        pages.write(stub, memory, image.pages())


def round_trip(process: Process, path: Path, before: list[Vma]) -> list[str]:
    """The differences between the process and its copy."""
    with ExitStack() as stack:
        files = SameFiles()
        stack.callback(files.close)
        save(process, files, path, before)
        old = compare.snapshot(process.pid)
        with open_image(path) as image:
            memory = next(image.records(Kind.MAPPINGS)).decode(MemoryLayout)
            assert describe(image)["memory"]["mappings"][0]["pid"] == process.pid
        stub = stack.enter_context(stub_for(memory))
        load(stub, memory, files, path)
        stub.leave()
        found = compare.differences(old, compare.snapshot(stub.pid))
        found += kernel_fields(process.pid, stub.pid)
        return found


def round_trip_with_files(process: Process) -> list[str]:
    """As round_trip(), with the files of the real table: those that live nowhere else are made anew."""
    with ExitStack() as stack:
        table = FileTable()
        stack.callback(table.close)
        with Injection(process) as injection:
            calls = CallTable()
            brk = layout.query_brk(calls)
            injection.run({process.leader.tid: calls})
        process.forget_maps()
        memory = layout.capture(process, table, brk=brk.value)
        old = compare.snapshot(process.pid)
        warnings: list[str] = []
        rebuilder = Rebuilder(table.records(), warn=warnings.append)
        stack.callback(rebuilder.close)
        rebuilder.rebuild()
        stub = stack.enter_context(stub_for(memory))
        layout.build(memory, stub, rebuilder.descriptor)
        for index in range(len(table.contents)):
            for start, length in table.contents.runs(index):
                rebuilder.write_content(index, [(start, length)], table.contents.read(index, start, length))
        pages.write(stub, memory, pages.read(process, memory))
        stub.leave()
        assert len(table.contents) == 3  # shared anonymous memory, a memfd, a deleted file
        return compare.differences(old, compare.snapshot(stub.pid)) + warnings


def kernel_fields(a: int, b: int) -> list[str]:
    names = [
        *("start_code", "end_code", "start_data", "end_data", "start_brk", "start_stack"),
        *("arg_start", "arg_end", "env_start", "env_end"),
    ]
    old, new = read_stat(a), read_stat(b)
    found = [name for name in names if getattr(old, name) != getattr(new, name)]
    for name in ("auxv", "cmdline", "environ"):
        if Path(f"/proc/{a}/{name}").read_bytes() != Path(f"/proc/{b}/{name}").read_bytes():
            found.append(name)
    if os.readlink(f"/proc/{a}/exe") != os.readlink(f"/proc/{b}/exe"):
        found.append("exe")
    return found


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("mappings") / "mappings"
    subprocess.run(["gcc", "-O1", "-o", binary, SOURCE], check=True)
    return binary


def test_every_kind_of_mapping_comes_back_with_every_byte(zoo: Path, tmp_path: Path) -> None:
    with running(str(zoo), str(tmp_path)) as (process, line):
        assert refusals(verdicts(process.pid)) == []
        before = read_smaps(process.pid)
        with stopped(process.pid) as tracee:
            maps = read_maps(process.pid)
            assert round_trip(tracee, tmp_path / "image", before) == []
            assert read_maps(process.pid) == maps
        with open_image(tmp_path / "image") as image:
            memory = next(image.records(Kind.MAPPINGS)).decode(MemoryLayout)
        assert memory.fields.brk == int(line, 16)
        assert memory.fields.brk % 4096
        assert sum(end - start for start, end in memory.guards) == 2 * 4096
        assert process.poll() is None


def test_memory_behind_files_that_live_nowhere_else_comes_back(zoo: Path, tmp_path: Path) -> None:
    with running(str(zoo), str(tmp_path)) as (process, _), stopped(process.pid) as tracee:
        assert round_trip_with_files(tracee) == []


def test_an_interpreter_comes_back_with_every_byte(tmp_path: Path) -> None:
    code = "import json, ssl, time\nx = [str(i) * 50 for i in range(20000)]\nprint(1, flush=True)\ntime.sleep(60)"
    with running(sys.executable, "-c", code) as (process, _):
        with stopped(process.pid) as tracee:
            assert round_trip(tracee, tmp_path / "image", []) == []


def test_a_difference_of_one_byte_is_found(zoo: Path, tmp_path: Path) -> None:
    with running(str(zoo), str(tmp_path)) as (process, _), stopped(process.pid) as tracee:
        old = compare.snapshot(process.pid)
        heap = next(vma for vma in tracee.maps if vma.name == "[heap]")
        byte = tracee.read(heap.start + 5000, 1)
        tracee.write(heap.start + 5000, bytes([byte[0] ^ 1]))
        found = compare.differences(old, compare.snapshot(process.pid))
        assert len(found) == 1
        assert "[heap]: digest" in found[0]


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MemoryLayout, SameFiles]]:
    """The layout of a small process, and its files."""
    path = tmp_path_factory.mktemp("simple") / "image"
    files = SameFiles()
    with running("sh", "-c", "echo; exec sleep 60") as (process, _), stopped(process.pid) as tracee:
        save(tracee, files, path, [])
    with open_image(path) as image:
        yield next(image.records(Kind.MAPPINGS)).decode(MemoryLayout), files
    files.close()


def test_another_vdso_that_is_none_is_refused(simple: tuple[MemoryLayout, SameFiles]) -> None:
    memory, files = simple
    with stub_for(memory) as stub, pytest.raises(OtherVdso, match="segments"):
        layout.build(replace(memory, vdso=memory.vdso[:40]), stub, files.descriptor)
    data_only = tuple(m for m in memory.mappings if m.name != "[vdso]")
    with stub_for(memory) as stub, pytest.raises(OtherVdso, match="without a vdso"):
        layout.build(replace(memory, mappings=data_only), stub, files.descriptor)


def test_a_layout_that_reaches_into_the_stubs_window_is_refused(simple: tuple[MemoryLayout, SameFiles]) -> None:
    memory, files = simple
    with stub_for(memory) as stub:
        inside = Mapping(start=stub.window[1] - 4096, end=stub.window[1] + 4096, prot=3)
        bad = replace(memory, mappings=(inside, *memory.mappings))
        with pytest.raises(BadLayout, match="where the stub works"):
            layout.build(bad, stub, files.descriptor)


def test_what_the_kernel_refuses_is_named(simple: tuple[MemoryLayout, SameFiles]) -> None:
    memory, files = simple
    # more than the whole address space of a file may be asked for
    far = Mapping(start=1 << 40, end=(1 << 40) + 4096, prot=1, file=0, offset=(1 << 63) - 4096, name="far out")
    mappings = sorted((far, *memory.mappings), key=lambda m: m.start)
    with stub_for(memory) as stub, pytest.raises(BadLayout, match="far out"):
        layout.build(replace(memory, mappings=tuple(mappings)), stub, files.descriptor)
