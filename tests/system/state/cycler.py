"""A process in a test host that takes trees apart and puts them together again, as it is told, line by line (JSON).

Each cycle is done by a fork of this process, which has imported everything: so a cycle costs what the work costs.  The
tree is written to an image file, ended, and restored from it.  In the stop, before and after, everything that /proc
shows of each process is read, and every byte of its memory: what differs is told.

    {"pid": N, "image": PATH, "without": [..], "whole": BOOL, "external": [..], "ship": [..]}
      ->  {"ms": [stop, restore], "differs": [..], "warnings": [..]}  or  {"error": TEXT}
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pyroute2  # noqa: F401  # what the tool imports late is imported before the first fork

from checkpoint import procfs
from checkpoint.dump import Dump
from checkpoint.files.policy import External, Policy
from checkpoint.image.frames import Kind
from checkpoint.image.reader import open_image
from checkpoint.image.writer import ImageFile
from checkpoint.namespaces.spaces import entered
from checkpoint.restore import Restore
from tests.system import proc_view
from tests.system.state import without


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two plain values differ, a line each."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted({*was, *now}, key=str)
        return [d for k in keys for d in differences(was.get(k), now.get(k), f"{path}/{k}")]
    return [] if was == now else [f"{path}: {was!r} -> {now!r}"]


def decided(order: dict[str, Any]) -> Policy:
    """What a user would have said, and a target told: it has all directories, but not the files that are to travel."""
    external = tuple(External.parse(rule) for rule in order["external"])
    if not order["ship"]:
        return Policy(external=external)
    links = [link for pid in procfs.tree(order["pid"]) for link in open_files(pid)]
    apart = frozenset(link for link in links if os.path.basename(link) in order["ship"])
    return Policy(external=external, ship=True, shared=frozenset(map(os.path.dirname, links)), apart=apart)


def open_files(pid: int) -> list[str]:
    """Paths of all that a process has open or mapped."""
    found = []
    for place in ("fd", "map_files"):
        for name in os.listdir(f"/proc/{pid}/{place}"):
            found.append(os.readlink(f"/proc/{pid}/{place}/{name}"))
    return found


def cycle(pid: int, image: Path, whole: bool, policy: Policy) -> dict[str, Any]:
    """Out and in again; out from where its objects are seen."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(entered(pid))
        return _cycle(pid, image, whole, policy, stack)


def _cycle(pid: int, image: Path, whole: bool, policy: Policy, outside: contextlib.ExitStack) -> dict[str, Any]:
    dump = Dump([pid], policy)
    try:
        dump.prepare()
        dump.find_listeners()
        dump.make_ready()
        dump.hold_off()
        dump.drain()
        dump.stop()
        living = {
            p.pid: [(t.rseq.address, t.rseq.address + t.rseq.size) for t in p.threads if t.rseq]
            for p in dump.tree.processes
        }
        dead = [stat.pid for stat in dump.tree.zombies]

        def look() -> dict[int, Any]:
            found = {p: proc_view.look(p, areas, whole=whole) for p, areas in living.items()}
            return found | {p: proc_view.dead(p) for p in dead}

        before = look()
        looked = time.monotonic()
        with ImageFile(image) as file:
            for kind, record in dump.skeleton():
                file.record(kind, record)
            file.pages(dump.pages(buffers=file.AHEAD + 2))
            dump.secure()
            file.pages(dump.early_queues())
            dump.freeze()
            file.pages(dump.queues())
            file.record(Kind.FILES_DELTA, dump.delta(clocks_stand=True))
    except BaseException:
        dump.resume()
        raise
    warnings = list(dump.warnings)
    dump.discard()
    outside.close()
    written = time.monotonic()
    _until_gone([*living, *dead])
    restore = Restore(warn=warnings.append)
    try:
        with open_image(image) as read:
            for frame in read.frames:
                restore.apply(frame)
            restore.end()
            for connection, difference in restore.prepare():
                raise restore.differs(connection, difference)
            restore.survive()
            restore.release()
            done = time.monotonic()
            after = look()
            restore.connect()
            restore.tell_windows()
            restore.run()
    except BaseException:
        restore.abort()
        raise
    restore.close()
    return {
        "ms": [1e3 * (written - looked), 1e3 * (done - written)],
        "differs": differences(before, after),
        "warnings": warnings,
    }


def _until_gone(pids: list[int]) -> None:
    """The originals' numbers are free: whoever was the parent has reaped them."""
    end = time.monotonic() + 10
    # the number of a terminal is free a moment after its last descriptor is closed
    while any(procfs.exists(pid) for pid in pids) or os.listdir("/dev/pts") != ["ptmx"]:
        if time.monotonic() > end:
            raise TimeoutError(f"some of {pids} did not go")
        time.sleep(0.001)


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                without.apply(order["without"])
                answer = cycle(order["pid"], Path(order["image"]), order["whole"], decided(order))
            except BaseException as error:
                answer = {"error": f"{error}\n{traceback.format_exc()}"}
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(json.dumps(answer).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        print(said.decode() or json.dumps({"error": "the cycle died"}), flush=True)


if __name__ == "__main__":
    serve()
