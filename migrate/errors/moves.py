"""Errors of moves as a whole: several at once, memory that does not converge or comes later."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "MoveDied",
    "NothingDrained",
    "NothingMatches",
    "PageBringerFailed",
    "PageLineLost",
    "PagesPending",
    "RotationName",
    "WritesTooFast",
]


class WritesTooFast(TcpmigError):
    """While a process's memory was copied it wrote as fast as the line carries, so that what remained for the stop did
    not shrink to what --max-downtime allows; and --if-busy refuse was given. Nothing was stopped."""

    code = "TM-0650"
    fix = "Allow a longer stop with --max-downtime or --if-busy stop, or move it at a quieter time."


class NothingMatches(TcpmigError):
    """No process of this PID namespace has a command line that a pattern of --all-matching is found in; init, kernel
    threads, and the programs that started tcpmig do not count. Nothing was done."""

    code = "TM-0651"
    outcome = Outcome.REFUSED
    fix = "Look at the command lines with `pgrep -af PATTERN`."


class MoveDied(TcpmigError):
    """One of several moves ended without a word: its program was killed, or broke. What became of its processes is in
    its journal."""

    code = "TM-0652"
    outcome = Outcome.IN_DOUBT
    fix = "Run `tcpmig recover` on both hosts."


class PageLineLost(TcpmigError):
    """The line on which pages of memory come from the host where the processes were (migrate --lazy) is cut, or was
    never there. Who needs such a page waits."""

    code = "TM-0753"
    fix = "Wait until the source dials again, or run `tcpmig recover` there."


class PagesPending(TcpmigError):
    """The processes run at the target, and pages of their memory that are still here (migrate --lazy) cannot get
    there: the line was lost for a minute, or those who bring the pages there were killed. The originals are kept,
    stopped and without connections: they must not be run again."""

    code = "TM-0754"
    outcome = Outcome.IN_DOUBT
    fix = "Run `tcpmig recover ID` here when the line can be had again; if the copy is gone, kill the originals."


class PageBringerFailed(TcpmigError):
    """The program that brings pages of memory to processes that run already (--lazy) could not be started, or died
    before they ran. Nothing is left of them."""

    code = "TM-0752"
    fix = "Look into its log, TCPMIG_STATE_DIR/log/*-lazy-*.log, and try again, or do without --lazy."


class NothingDrained(TcpmigError):
    """No process tree has a connection or listens on an address of this host that can move; or nothing that came by the
    drain of that ID runs here any more. Nothing was done."""

    code = "TM-0653"
    outcome = Outcome.REFUSED
    fix = "`tcpmig conns` lists the connections here; `tcpmig drain --list` lists what came here by drains."


class RotationName(TcpmigError):
    """With --every the file that -o names is a symbolic link to the newest of a row of images; a file or directory of
    that name would be lost. Nothing was done."""

    code = "TM-0654"
    outcome = Outcome.REFUSED
    fix = "Name another file with -o, or move the one that is there."
