"""What the first use of anything costs, paid before the stop instead of in it.

Each end gets ready what it will do itself: the source reads no image, and a checkpoint speaks to nobody.
"""

from __future__ import annotations

import gc

from checkpoint import births, records, rehearsal
from migrate.journal import JournalRecord
from migrate.messages import Abort, Measured, Message, Prepared, Probed, Refused, Running, Started, Stuck, Verdicts
from tcpstate import codec, slotted
from tcpstate.kernel.bpf.signed import nobody_signs
from tcpstate.rehearsal import rehearse
from tcpstate.segment import Segment

__all__ = ["arriving", "leaving", "speaking"]


def leaving(*, connections: bool) -> None:
    """Where processes are stopped and captured.

    connections  they have connections or listeners
    """
    _warm(connections=connections, built=False)
    codec.prepare(JournalRecord, Segment, unpacked=False)
    _settled()


def speaking() -> None:
    """The source of a migration, besides: its messages, and the target's answers."""
    codec.prepare(Message, unpacked=False)
    codec.prepare(Verdicts, Refused, Measured, Probed, Prepared, Started, Running, Stuck, Abort)


def arriving() -> None:
    """Where processes are built."""
    # Tried first, in a child: what is used from then on is ours alone again by the stop, and not copied in it.
    births.ask()
    _warm(connections=True, built=True)
    births.threads_go_on()
    codec.prepare(Message, JournalRecord, Segment)
    _settled()


def _warm(*, connections: bool, built: bool) -> None:
    if connections:
        rehearse()
        nobody_signs()
    records.prepare(read=built)
    rehearsal.rehearse(built=built)


def _settled() -> None:
    slotted.complete()
    # What lives by now lives to the end: a collection in the stop need not look at it again.
    gc.collect()
    gc.freeze()
