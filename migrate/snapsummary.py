"""What a checkpoint and a restore tell of themselves: what users read, and `--json` prints."""

from __future__ import annotations

from dataclasses import field

from migrate.rounds import Round
from tcpstate.errors import Outcome
from tcpstate.slotted import dataclass

__all__ = ["CheckpointSummary", "RestoreSummary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What a checkpoint did.

    pid, pids    the (first) root; all processes
    file, bytes  the image
    connections  how many it holds
    addresses    those that a restore on another host needs
    hold         the ID of the hold that has the connections; empty if there is none
    running      whether the processes run on
    stop_ms      how long they stood still (until they were resumed, or ended)
    phases       milliseconds of its steps while they stood still: stop, write, hold
    rounds       transfers of memory before that
    inherited    bytes of memory that earlier images have
    """

    pid: int
    pids: tuple[int, ...]
    file: str
    bytes: int
    connections: int
    addresses: tuple[str, ...]
    hold: str
    running: bool
    stop_ms: float
    total_ms: float
    phases: dict[str, float] = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()
    inherited: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSummary:
    """What a restore did.

    pid, pids    the (first) root; root PIDs in the image and here
    init         here, the first process of a PID namespace that was made for them; 0: none was
    connections  how many live again
    held         how many of those were taken back from a hold of this host
    addresses    those that were added
    run_ms       until they ran; in total_ms is that their addresses are told again and again
    phases       milliseconds of the steps until then: check, build, connections, start, release
    later        bytes of memory that come while they run
    """

    pid: int
    pids: dict[int, int]
    init: int
    file: str
    connections: int
    held: int
    addresses: tuple[str, ...]
    total_ms: float
    run_ms: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    later: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def status(self) -> Outcome:
        """The exit status."""
        return Outcome.DONE
