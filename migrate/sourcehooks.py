"""The hooks of a source, in step with its migration: :mod:`migrate.unithook` and :mod:`migrate.takeoverhook`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from migrate import takeoverhook
from migrate.errors import AddressNotTaken, NothingToTakeOver
from migrate.journal import Journal
from migrate.messages import Needs
from migrate.summary import SourceOptions
from migrate.takeoverhook import TakeoverHook
from migrate.unithook import HookFacts, UnitHook

__all__ = ["SourceHooks"]

_log = logging.getLogger(__name__)


class SourceHooks:
    """Those that the options name. UnitHookSyntax, TakeoverHookSyntax."""

    def __init__(self, options: SourceOptions, migration: str, host: str) -> None:
        facts = HookFacts(command="migrate", role="source", migration=migration, host=host)
        self._unit = UnitHook(options.unit_hook, facts) if options.unit_hook else None
        self._takeover = None
        if options.takeover_hook:
            self._takeover = TakeoverHook(options.takeover_hook, facts, limit=options.takeover_limit)

    def __bool__(self) -> bool:
        return self._unit is not None or self._takeover is not None

    def judge(self, addresses: Collection[object]) -> None:
        """Is there something to do for them? NothingToTakeOver."""
        if self._takeover is not None and not addresses:
            raise NothingToTakeOver("no address moves", object=self._takeover.command)

    def before_stop(self, needs: Needs, moved: tuple[str, ...], journal: Journal) -> None:
        """All checks have passed. What the hooks have to be told at the end is in the journal first. UnitHookFailed,
        TakeoverHookRefused."""
        roots = tuple(tree.root for tree in needs.trees)
        if self._takeover is not None:
            self._takeover.facts = replace(self._takeover.facts, pids=roots, addresses=moved, units=needs.units)
            journal.note(takeoverhook.NOTE, self._takeover.note())
        if self._unit is not None:
            facts = replace(self._unit.facts, pids=roots, addresses=moved, units=needs.units)
            journal.note("unit-hook", self._unit.note(facts))
            self._unit.before_stop(facts)
        if self._takeover is not None:
            self._takeover.check()

    def take(self, pids: Mapping[int, int], meanwhile: Callable[[], None]) -> str:
        """They run there (``pids``: here to there); ``meanwhile`` is called while the hook runs. Why the addresses were
        not brought there, or nothing."""
        if self._takeover is None:
            return ""
        try:
            self._takeover.take(_pids_there(self._takeover.facts, pids), meanwhile)
        except AddressNotTaken as error:
            _log.warning("%s. %s", error.message, error.fix)
            return error.message
        return ""

    def committed(self, pids: Mapping[int, int]) -> None:
        """The originals are gone. UnitHookFailed."""
        if self._unit is not None:
            self._unit.committed(_pids_there(self._unit.facts, pids))

    def aborted(self) -> None:
        """All is undone. UnitHookFailed, TakeoverHookRefused; both are called in any case."""
        try:
            if self._takeover is not None:
                self._takeover.undo()
        finally:
            if self._unit is not None:
                self._unit.aborted()


def _pids_there(facts: HookFacts, pids: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(pids.get(root, 0) for root in facts.pids)
