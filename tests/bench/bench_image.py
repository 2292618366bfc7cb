"""GB/s of the image container in memory: ``python tests/bench/bench_image.py [MiB]``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from checkpoint.image.format import FrameReader, FrameWriter, PageRun, Space, page_frames
from checkpoint.image.frames import DATA_MAX

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


def timed(name: str, count: int, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    print(f"{name:50s} {count * DATA_MAX / (time.perf_counter() - start) / 1e9:6.2f} GB/s")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    with ThreadPoolExecutor(2) as pool:
        for pieces in (1, 256):
            work = runs(count, pieces)
            for executor in (None, pool):
                label = f"{pieces} runs per frame, {'2 threads' if executor else '1 thread'}"

                def write() -> None:
                    writer = FrameWriter()
                    writer.begin()
                    for _ in page_frames(writer, work, executor):
                        pass
                    writer.end()

                timed(f"write, {label}", count, write)
                writer = FrameWriter()
                stream = b"".join([*writer.begin(), *(b for f in page_frames(writer, work) for b in f), *writer.end()])

                def read(direct: bool) -> None:
                    reader = FrameReader(executor=executor)
                    view, at = memoryview(stream), 0
                    while at < len(stream):
                        if direct:
                            into = reader.buffer()
                            size = min(len(into), len(view) - at)
                            into[:size] = view[at : at + size]
                            found = reader.received(size)
                        else:
                            size = min(1 << 16, len(view) - at)
                            found = reader.feed(view[at : at + size])
                        at += size
                        for frame in found:
                            if frame.data:
                                frame.pages()
                            frame.release()
                    reader.close()

                timed(f"read by feed(), 64 KiB chunks, {label}", count, lambda: read(False))
                timed(f"read by buffer(), {label}", count, lambda: read(True))


if __name__ == "__main__":
    main()
