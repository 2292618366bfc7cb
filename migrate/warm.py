"""What the first use of anything costs, paid before the stop instead of in it."""

from __future__ import annotations

import gc

from checkpoint import records, rehearsal
from migrate.journal import JournalRecord
from migrate.messages import Message
from tcpstate import codec, slotted
from tcpstate.kernel.bpf.layout import parsed_once
from tcpstate.kernel.bpf.signed import nobody_signs
from tcpstate.rehearsal import rehearse
from tcpstate.segment import Segment

__all__ = ["warm"]


def warm() -> None:
    """Get everything ready that both ends of a migration will use while the processes stand still."""
    with parsed_once():
        rehearse()
        nobody_signs()
        records.prepare()
        codec.prepare(Message, JournalRecord, Segment)
        rehearsal.rehearse()
        slotted.complete()
    # What lives by now lives to the end: a collection in the stop need not look at it again.
    gc.collect()
    gc.freeze()
