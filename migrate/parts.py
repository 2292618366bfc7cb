"""What a migration needs of the rooms below: processes on their way out, and on their way in.

:mod:`migrate.source` and :mod:`migrate.target` drive one object of each kind through the nine steps of
``docs/design/contracts.md``.  The numbers below are those steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from checkpoint.files.held import HeldSocket
from checkpoint.traces import NoteWriter
from checkpoint.verdict import Verdict
from migrate.messages import Comparison, Lost, Needs
from migrate.rounds import Round
from migrate.wire import ImageSink, ImageWriter
from tcpstate.slotted import dataclass

__all__ = ["Arrived", "Incoming", "NoteWriter", "Outgoing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """The processes run.

    pids         root processes: PID at the source to PID here
    released_ns  when the last thread was released, CLOCK_MONOTONIC
    lost         connections that did not come through
    """

    pids: dict[int, int]
    released_ns: int
    lost: tuple[Lost, ...] = ()


class Outgoing(Protocol):
    """N process trees at the source. Every method may raise a TcpmigError; what was done is then undone by
    :meth:`resume`, which the driver calls."""

    def meet(self, features: frozenset[str]) -> None:
        """In step 1, once it is known: what the target's kernel can (:func:`migrate.hostfacts.features`)."""

    def needs(self) -> Needs:
        """Step 1: look at everything, stop nothing. Raises what has to be refused. ``addresses`` and ``macs`` are left
        empty."""

    def share(self, shared: Sequence[str], apart: Sequence[str]) -> None:
        """The target's answer about files that are open for writing.

        shared  directories (of this host) that are the very same there
        apart   files that are not the same there, and travel
        """

    def begin(self, note: NoteWriter) -> None:
        """Step 2: nothing has been changed yet; from now on ``note`` keeps what undoing needs, before it is changed."""

    def copy_live(
        self, image: ImageWriter, there: Callable[[int], int], settle: Callable[[], None]
    ) -> Iterator[tuple[Round, Mapping[int, int]]]:
        """Step 2: memory is copied in rounds while everything runs, a round each time the iterator is asked.

        there   a time of our CLOCK_MONOTONIC as one of the target's, not too late
        settle  returns when the target has taken in what was sent

        Yields what a round took, and the bytes written since by each process; ends if there can be no rounds.
        """

    def copy_ahead(
        self, image: ImageWriter, moved: Sequence[str], there: Callable[[int], int], settle: Callable[[], None]
    ) -> None:
        """Step 2, after the rounds: idle connections are told, and built at the target while they go on here.

        moved   the addresses that will leave this host
        there   a time of our CLOCK_MONOTONIC as one of the target's, rather too early than too late
        settle  as for :meth:`copy_live`
        """

    def prepare(self, note: NoteWriter) -> None:
        """Step 2: SYNs are captured, listeners take no new connections, accept queues drain.

        note  kept, now and in later steps: what undoing needs, before anything is changed
        """

    def stop(self, moved: Sequence[str]) -> None:
        """Step 3: everything stands still and is captured; nothing of ours is left inside.

        moved  the addresses that will leave this host
        """

    def send(self, image: ImageWriter) -> bool:
        """Steps 4 and 5: the skeleton and the pages, while the sockets still live.

        Whether that was little, which the target builds in a few milliseconds: then the sockets need not wait for it.
        """

    def freeze(self, image: ImageWriter) -> int:
        """Step 6: segments are captured, sockets frozen and exported, the last records sent.

        Returns when the connections' clocks were read: CLOCK_MONOTONIC, nanoseconds.
        """

    @property
    def connections(self) -> int:
        """How many connections move; known after :meth:`freeze`."""

    @property
    def ahead(self) -> int:
        """How many of them were built before the stop, and are the same; known after :meth:`freeze`."""

    def held(self) -> list[HeldSocket]:
        """After :meth:`freeze`: the connections to other hosts, and the listeners."""

    def segments(self) -> Sequence[bytes]:
        """The segments captured since the last call. After :meth:`discard` too, until :meth:`close`."""

    def resume(self) -> None:
        """Undo everything, at whatever step; the addresses are back. Again: nothing more."""

    def hold(self) -> None:
        """In doubt: leave everything as it is, stopped and silent, also after this program has ended."""

    def throttle(self, share: float) -> None:
        """Step 2, between rounds: let the processes run only this part of the time, until step 3."""

    def leave_pages(self) -> None:
        """Before step 3: memory that can be had later stays here for now."""

    @property
    def later(self) -> int:
        """After step 5: bytes that do."""

    @property
    def numbered(self) -> dict[int, int]:
        """After step 3: the processes, number in the image to ours."""

    def discard(self, *, keep_memory: bool = False) -> None:
        """Step 9: they run at the target. End the originals without a packet. The addresses are gone.

        keep_memory  the processes stand still until :meth:`end`
        """

    def end(self) -> None:
        """The target has all of their memory: they end."""

    def close(self) -> None:
        """Close what is open here. Last, in every case."""


class Incoming(ImageSink, Protocol):
    """N process trees at the target. The image's bytes are put into it as they come (:class:`ImageSink`), and it builds
    what can be built. Nothing of it survives this program until :meth:`keep`.

    stands   whether processes that still run there stand here already, as far as rounds of pre-copy have told them
    stopped  whether the image has come to what was told when the processes stood still
    """

    stands: bool
    stopped: bool

    def expect(self) -> None:
        """Before step 1, if the source has announced it: what takes time and needs no knowledge of the processes, while
        the source looks at them."""

    def check(self, needs: Needs, options: dict[str, str]) -> list[Verdict]:
        """Step 1: a verdict on every PID, path and feature that is needed here. Nothing is built."""

    def prepare(self, note: NoteWriter) -> None:
        """The source is about to stop the processes: what can be made ready is.

        note  kept, now and in later steps: what undoing needs, before anything is changed
        """

    def rebuild(self, elapsed: Callable[[], float]) -> Comparison:
        """Step 6: the image is complete. Sockets are rebuilt in repair, exported again and compared.

        elapsed  seconds since the connections' clocks were read at the source, never below zero
        """

    def keep(self) -> None:
        """Step 8: the processes outlive this program from now on: stopped, should it die."""

    def release(self) -> None:
        """Step 8: the addresses are here. Sockets leave repair, and send what was never sent."""

    def replay(self, segments: Sequence[bytes]) -> None:
        """Step 8: segments captured at the source (and those captured here) reach the connections. Again after
        :meth:`run`, for those that came late."""

    def run(self) -> Arrived:
        """Step 8: threads get their registers and are let go."""

    def forget(self) -> None:
        """They run, and that is journalled: nothing needs to be known of their building any more."""

    def discard(self) -> None:
        """Leave nothing: no process, socket or file made here. At any step before :meth:`release`; again: nothing
        more."""

    def hold(self) -> None:
        """Something broke after the release began: leave everything as it is."""

    def close(self) -> None:
        """Close what is open here. Last, in every case."""
