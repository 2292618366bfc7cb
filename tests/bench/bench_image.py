"""GB/s of the image container in memory: ``python -m tests.bench.bench_image [MiB]``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from checkpoint.image.format import Frame, FrameReader, FrameWriter, PageRun, Space, page_frames
from checkpoint.image.frames import DATA_MAX
from tests.bench.results import note

BLOCK = memoryview(os.urandom(DATA_MAX))


def runs(count: int, pieces: int) -> list[PageRun]:
    size = DATA_MAX // pieces
    return [
        PageRun(
            space=Space.MEMORY,
            id=1,
            runs=tuple(((i << 21) + k * 2 * size, size) for k in range(pieces)),
            data=BLOCK,
        )
        for i in range(count)
    ]


def write(work: list[PageRun], executor: Executor | None) -> None:
    writer = FrameWriter()
    writer.begin()
    for _ in page_frames(writer, work, executor):
        pass
    writer.end()


def take(found: list[Frame]) -> None:
    for frame in found:
        if frame.data:
            frame.pages()
        frame.release()


def feed(stream: bytes, executor: Executor | None) -> None:
    reader, view = FrameReader(executor=executor), memoryview(stream)
    for at in range(0, len(view), 1 << 16):
        take(reader.feed(view[at : at + (1 << 16)]))
    reader.close()


def receive(stream: bytes, executor: Executor | None) -> None:
    reader, view, at = FrameReader(executor=executor), memoryview(stream), 0
    while at < len(view):
        into = reader.buffer()
        size = min(len(into), len(view) - at)
        into[:size] = view[at : at + size]
        at += size
        take(reader.received(size))
    reader.close()


def timed(name: str, count: int, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    rate = count * DATA_MAX / (time.perf_counter() - start) / 1e9
    print(f"{name:50s} {rate:6.2f} GB/s", flush=True)
    note("image", what=name, rate=rate)


def measure(count: int, pieces: int, executor: Executor | None) -> None:
    label = f"{pieces} runs per frame, {'2 threads' if executor else '1 thread'}"
    work = runs(count, pieces)
    timed(f"write, {label}", count, lambda: write(work, executor))
    writer = FrameWriter()
    stream = b"".join([*writer.begin(), *(b for f in page_frames(writer, work) for b in f), *writer.end()])
    timed(f"read by feed(), 64 KiB chunks, {label}", count, lambda: feed(stream, executor))
    timed(f"read by buffer(), {label}", count, lambda: receive(stream, executor))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    timed("floor: bytes copied once", count, lambda: [bytes(BLOCK) for _ in range(count)])
    with ThreadPoolExecutor(2) as pool:
        for pieces in (1, 256):
            for executor in (None, pool):
                measure(count, pieces, executor)


if __name__ == "__main__":
    main()
