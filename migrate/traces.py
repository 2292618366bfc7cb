"""What a journal's notes tell, decoded: :mod:`checkpoint.traces` as one value."""

from __future__ import annotations

import os
from dataclasses import field
from pathlib import Path
from typing import TypeVar

from checkpoint.traces import FrozenTree, HeldListeners, Made, Peeked, Roots, Rules, Stubs, Trace, Traced, alive
from migrate import kept
from migrate.errors import JournalDamaged
from migrate.journal import JournalView
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.shelf import Shelved
from tcpstate.slotted import dataclass

__all__ = ["Traces"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What was written down before it was changed. The newest of each kind; of paths, all."""

    roots: Roots | None = None
    rules: Rules | None = None
    listeners: HeldListeners | None = None
    shelf: Shelved | None = None
    peeked: Peeked | None = None
    tree: FrozenTree | None = None
    stubs: Stubs | None = None
    made: tuple[Made, ...] = field(default=())
    kept: tuple[Path, ...] = field(default=())

    @classmethod
    def of(cls, view: JournalView) -> Traces:
        """The notes of a journal. JournalDamaged if one is not what its name says."""

        def last(name: Trace, kind: type[_T]) -> _T | None:
            notes = view.notes(name)
            return codec.unpack(kind, notes[-1]) if notes else None

        try:
            return cls(
                roots=last(Trace.ROOTS, Roots),
                rules=last(Trace.RULES, Rules),
                listeners=last(Trace.LISTENERS, HeldListeners),
                shelf=last(Trace.SHELF, Shelved),
                peeked=last(Trace.PEEKED, Peeked),
                tree=last(Trace.TREE, FrozenTree),
                stubs=last(Trace.STUBS, Stubs),
                made=tuple(codec.unpack(Made, data) for data in view.notes(Trace.MADE)),
                kept=tuple(Path(os.fsdecode(data)) for data in view.notes(kept.NOTE)),
            )
        except BadRecord as error:
            raise JournalDamaged(f"a note cannot be read: {error.message}", object=str(view.path)) from error

    @property
    def originals(self) -> list[Traced]:
        """The processes that were to leave, as far as they are known: all that stood still, else the roots."""
        if self.tree is not None:
            return self.tree.processes
        return [] if self.roots is None else self.roots.processes

    def found(self) -> list[str]:
        """What may still be there, in words for a person."""
        words = []
        living = alive(self.originals)
        if living:
            words.append("processes " + " ".join(str(each.pid) for each in living))
        if self.tree is not None and self.tree.connections and living:
            words.append(f"{len(self.tree.connections)} connections that may be frozen")
        if self.listeners is not None and self.listeners.listeners and living:
            words.append(f"{len(self.listeners.listeners)} listeners that may drop SYNs")
        if self.shelf is not None and self.shelf.holder.lives:
            words.append(f"connections that wait to be accepted, kept by process {self.shelf.holder.pid}")
        stubs = [] if self.stubs is None else alive(self.stubs.processes)
        if stubs:
            words.append("rebuilt processes " + " ".join(str(each.pid) for each in stubs))
        if self.rules is not None:
            words.append("rules " + " ".join(str(priority) for priority in sorted(self.rules.priorities.values())))
        return words + [str(made.path) for made in self.made if os.path.lexists(made.path)]
