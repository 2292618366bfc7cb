"""What a migration is told by the command line, and what it tells at its end."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from checkpoint.verdict import Verdict
from migrate.forecast import Forecast
from migrate.messages import Lost, Needs
from migrate.rounds import IfBusy, Round
from migrate.takeover import AddressPolicy
from migrate.unithook import LIMIT
from tcpstate.errors import Outcome
from tcpstate.slotted import dataclass

__all__ = ["MAX_DOWNTIME_MS", "Checked", "SourceOptions", "Summary"]

#: milliseconds: what the copy in the stop may take, if the user does not say
MAX_DOWNTIME_MS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What the command line says.

    address         ``--address``: auto, none, forward, or addresses
    forward_to      ``--forward-to``: an address of the target; empty: that of its name
    policy          ``--address-policy``
    map_dev         ``--map-dev``: interface here to interface there
    precopy         memory is copied in rounds before the stop
    max_downtime_ms  ``--max-downtime``: how long the copy that remains for the stop may take, as far as can be told
    if_busy         ``--if-busy``: what if that cannot be reached
    lazy            ``--lazy``: no rounds; they run there at once, and memory comes later
    compress        the line may carry compressed bytes, where that is quicker
    forwarded       options for the rebuilding side, by name
    cpu_unused      ``--cpu-unused``: patterns of CPU features that the processes do without
    unit_hook       ``--unit-hook``: a program for this host; empty: none
    takeover_hook, takeover_limit  ``--takeover-hook``, and seconds that each of its calls may take
    rsh, remote_command  for the journal: how `recover` reaches the target
    state_directory  where the journal goes; None: TCPMIG_STATE_DIR
    """

    address: str = "auto"
    forward_to: str = ""
    policy: AddressPolicy = AddressPolicy.REFUSE
    map_dev: dict[str, str] = field(default_factory=dict)
    precopy: bool = True
    max_downtime_ms: float = MAX_DOWNTIME_MS
    if_busy: IfBusy = IfBusy.STOP
    lazy: bool = False
    compress: bool = True
    forwarded: dict[str, str] = field(default_factory=dict)
    cpu_unused: tuple[str, ...] = ()
    unit_hook: str = ""
    takeover_hook: str = ""
    takeover_limit: float = LIMIT
    rsh: str = ""
    remote_command: str = ""
    state_directory: Path | None = None

    @property
    def may_leave(self) -> bool:
        """Whether it may come to that memory comes later."""
        return self.lazy or self.if_busy is IfBusy.POSTCOPY


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a migration did; the fields of ``--json``.

    pid, target_pid  the (first) root here and there; ``pids`` all roots
    stop_ms          from the first thread stopped here to the last one released there, by this host's clock
    total_ms         from the first word to the last
    bytes_sent       on the line
    ahead            connections that were built before the stop, and were the same at its end
    phases           milliseconds of each phase
    lost             connections that did not come through
    forward          ID of the forwarding that was begun or ended, or empty
    not_taken        why the addresses are not there: the takeover hook failed
    later            bytes of memory that came after they ran there
    share            of the time that they ran during the last rounds (``--if-busy throttle``)
    """

    outcome: str
    migration: str
    pid: int
    target_pid: int
    pids: dict[int, int]
    connections: int
    ahead: int
    addresses: tuple[str, ...]
    rounds: tuple[Round, ...]
    stop_ms: float
    total_ms: float
    bytes_sent: int
    phases: dict[str, float]
    lost: tuple[Lost, ...] = ()
    forward: str = ""
    not_taken: str = ""
    later: int = 0
    share: float = 1.0

    @property
    def status(self) -> Outcome:
        """The exit status."""
        return Outcome.PARTIAL if self.lost or self.not_taken else Outcome.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What both sides say before anything is stopped: all verdicts. None refuses, unless it was only a check.

    forecast  what it would take; None: it was refused, it was no dry run, or the target cannot be asked
    """

    needs: Needs
    here: tuple[Verdict, ...]
    there: tuple[Verdict, ...]
    forecast: Forecast | None = None
