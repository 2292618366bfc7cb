"""Stand-ins for the processes of both sides, and a migration between them on a real line with real journals."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from checkpoint.files.held import HeldSocket
from checkpoint.traces import NoteWriter
from checkpoint.verdict import Verdict
from migrate.journal import End, Role, journals
from migrate.messages import Comparison, Difference, Message, Needs, TreeNeed
from migrate.parts import Arrived
from migrate.rounds import Round
from migrate.source import Source
from migrate.summary import SourceOptions, Summary
from migrate.target import Received, Target
from migrate.wire import Channel, ImageWriter
from tcpstate.errors import Outcome, TcpmigError

__all__ = ["Broken", "FakeIncoming", "FakeOutgoing", "FakeRemote", "Run", "World"]


class Broken(TcpmigError):
    """What the stand-ins raise: a refusal, to see that it becomes a failure after the stop."""

    code = "TM-9900"
    outcome = Outcome.REFUSED


class World:
    """Both hosts, seen from above."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.here = "running"
        self.there = "none"
        self.fail: dict[str, BaseException | Callable[[], None]] = {}
        self.lock = threading.Lock()

    def reach(self, point: str) -> None:
        with self.lock:
            self.events.append(point)
            self.check()
        failure = self.fail.pop(point, None)
        if isinstance(failure, BaseException):
            raise failure
        if failure is not None:
            failure()

    def check(self) -> None:
        assert not (self.here == "running" and self.there in ("running", "releasing")), self.events


class FakeOutgoing:
    connections = 3
    ahead = 1
    later = 0
    numbered: Mapping[int, int] = {}
    addresses: tuple[str, ...] = ("127.0.0.1",)

    def __init__(self, world: World) -> None:
        self.world = world
        self.captured = 0

    def meet(self, features: frozenset[str]) -> None:
        self.features = features

    def needs(self) -> Needs:
        self.world.reach("needs")
        return Needs(trees=(TreeNeed(root=77, pids=(77,), tids=(77,)),), used_addresses=self.addresses)

    def share(self, shared: Sequence[str], apart: Sequence[str]) -> None:
        self.world.reach("share")

    def prepare(self, note: NoteWriter) -> None:
        self.note = note
        self.world.reach("prepare")

    def begin(self, note: NoteWriter) -> None:
        note("roots", b"before anything is stopped")

    def copy_live(
        self, image: ImageWriter, there: Callable[[int], int], settle: Callable[[], None]
    ) -> Iterator[tuple[Round, Mapping[int, int]]]:
        for number in range(2):
            image.write([b"round", bytes(1 << 20)])
            image.flush()
            settle()
            self.world.reach(f"round {number + 1}")
            yield Round(bytes=1 << 20, ms=1.0), {77: (1 - number) << 30}

    def copy_ahead(
        self, image: ImageWriter, moved: Sequence[str], there: Callable[[int], int], settle: Callable[[], None]
    ) -> None:
        image.write([b"idle connections"])
        image.flush()
        settle()
        self.world.reach("connections")

    def stop(self, moved: Sequence[str]) -> None:
        self.world.here = "stopped"
        self.world.reach("stop")

    def send(self, image: ImageWriter) -> bool:
        for _ in range(3):
            image.write([b"head", bytes(1 << 20)])
        self.world.reach("send")
        return False

    def freeze(self, image: ImageWriter) -> int:
        self.note("sockets", b"as they were")
        self.world.reach("freeze")
        image.write([b"tail"])
        return time.monotonic_ns()

    def held(self) -> list[HeldSocket]:
        return []

    def segments(self) -> Sequence[bytes]:
        self.captured += 1
        return [b"segment %d" % self.captured] if self.captured < 4 else []

    def resume(self) -> None:
        self.world.here = "running"
        self.world.reach("resume")

    def hold(self) -> None:
        self.world.reach("hold")

    def throttle(self, share: float) -> None:
        raise AssertionError("nobody is slowed down")

    def leave_pages(self) -> None:
        raise AssertionError("nothing is left for later")

    def end(self) -> None:
        raise AssertionError("nothing was left for later")

    def discard(self, *, keep_memory: bool = False) -> None:
        assert not keep_memory
        self.world.here = "gone"
        self.world.reach("discard")

    def close(self) -> None:
        self.world.events.append("close")


class FakeIncoming:
    def __init__(self, world: World) -> None:
        self.world = world
        self.stands = self.stopped = True
        self.image = bytearray()
        self.room = memoryview(bytearray(1 << 18))
        self.replayed: list[bytes] = []
        self.elapsed = -1.0
        self.differences: tuple[Difference, ...] = ()
        self.verdicts: list[Verdict] = []

    def buffer(self) -> memoryview:
        return self.room

    def received(self, count: int) -> None:
        if not self.image:
            self.world.there = "built"
            self.world.reach("build")
        self.image += self.room[:count]

    def expect(self) -> None:
        self.world.events.append("expect")

    def check(self, needs: Needs, options: dict[str, str]) -> list[Verdict]:
        self.world.reach("check")
        assert options == {"map": "/a=/b"}
        return self.verdicts

    def prepare(self, note: NoteWriter) -> None:
        note("rules", b"that stand")

    def forget(self) -> None:
        self.world.events.append("forget")

    def rebuild(self, elapsed: Callable[[], float]) -> Comparison:
        self.elapsed = elapsed()
        self.world.reach("rebuild")
        return Comparison(connections=3, differences=self.differences)

    def keep(self) -> None:
        self.world.reach("keep")

    def release(self) -> None:
        self.world.there = "releasing"
        self.world.reach("release")

    def replay(self, segments: Sequence[bytes]) -> None:
        self.replayed += segments
        self.world.reach("replay")

    def run(self) -> Arrived:
        self.world.reach("run")
        self.world.there = "running"
        return Arrived(pids={77: 78}, released_ns=time.monotonic_ns())

    def discard(self) -> None:
        self.world.there = "none"
        self.world.reach("undo")

    def hold(self) -> None:
        self.world.reach("hold there")

    def close(self) -> None:
        self.world.events.append("close there")


class FakeRemote:
    """A line without a remote shell."""

    host = "b"

    def __init__(self, end: socket.socket, silence: float) -> None:
        self.channel = Channel(end.fileno(), end.fileno(), silence=silence)
        self.pid = os.getpid()

    def first(self) -> Message:
        found = self.channel.receive()
        assert isinstance(found, Message)
        return found

    def explain(self, error: TcpmigError) -> TcpmigError:
        return error


class Run:
    """One migration between two threads; what came of it.

    silence  seconds without a word that the source bears; the target bears more
    """

    def __init__(self, world: World, directory: Path, silence: float = 5.0, only_check: bool = False) -> None:
        self.world = world
        self.directory = directory
        ours, theirs = socket.socketpair()
        self.ours, self.theirs = ours, theirs
        self.outgoing, self.incoming = FakeOutgoing(world), FakeIncoming(world)
        self.silence = silence
        self.only_check = only_check
        #: set when the source has ended
        self.over = threading.Event()
        self.inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.received: Received | BaseException | None = None
        self.sent: Summary | BaseException | None = None

    def go(self) -> Run:
        self.channel = Channel(self.theirs.fileno(), self.theirs.fileno(), silence=self.silence + 5.0, listens=False)
        thread = threading.Thread(target=self._target)
        thread.start()
        options = SourceOptions(
            address="auto", forwarded={"map": "/a=/b"}, rsh="ssh", state_directory=self.directory / "here"
        )
        remote = FakeRemote(self.ours, self.silence)
        source = Source(self.outgoing, remote, options)  # type: ignore[arg-type]
        try:
            if self.only_check:
                source.check()
            else:
                self.sent = source.run()
        except BaseException as error:
            self.sent = error
        finally:
            self.over.set()
            self.ours.close()
        thread.join(20)
        assert not thread.is_alive()
        self.world.check()
        return self

    def _target(self) -> None:
        try:
            with self.inside():
                self.received = Target(self.incoming, self.channel, state_directory=self.directory / "there").run()
        except BaseException as error:
            self.received = error
        finally:
            self.theirs.close()

    def cut(self) -> None:
        """The line is cut, now."""
        self.ours.shutdown(socket.SHUT_RDWR)

    def ends(self) -> tuple[End | None, End | None]:
        """How the two journals ended: None if something is left to be settled."""
        found: dict[Role, End | None] = {}
        for side in ("here", "there"):
            for view in journals(self.directory / side):
                found[view.opened.role] = view.closed.end if view.closed else None
        return found.get(Role.SOURCE), found.get(Role.TARGET)
