"""Errors of the line between two hosts, of its protocol and of the command at its other end."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "AnotherMachine",
    "BadFrame",
    "InDoubt",
    "KeptFramesLost",
    "LinkLost",
    "LinkSilent",
    "NotTcpmig",
    "PreparedDiffers",
    "ProtocolError",
    "RemoteStartFailed",
    "RshSyntax",
    "SameHost",
    "SourceAborted",
    "TargetAborted",
    "TargetRefused",
    "TargetStuck",
    "UnitHookFailed",
    "UnitHookSyntax",
    "VersionMismatch",
]


class ProtocolError(TcpmigError):
    """The other side sent a message that is not legal at this point of the protocol, or one of another migration. That
    is a defect of one of the two programs, or somebody else writes into the channel. Before COMMIT the migration ends
    and the original runs on."""

    code = "TM-0601"
    fix = "Run the same release of tcpmig on both hosts; report it with both logs if it happens again."


class VersionMismatch(TcpmigError):
    """The two programs have no protocol version in common: one of them is much older than the other."""

    code = "TM-0602"
    outcome = Outcome.REFUSED
    fix = "Install the same release of tcpmig on both hosts."


class NotTcpmig(TcpmigError):
    """The first bytes from the other side are not the protocol's. Mostly a login script on the target prints something
    even where there is no terminal, or the remote command is not `tcpmig receive`."""

    code = "TM-0603"
    outcome = Outcome.REFUSED
    fix = "Run `CMD HOST true` with the same --rsh: it must print nothing. Check --remote-command."


class BadFrame(TcpmigError):
    """A frame of the channel has an impossible length or type, or a wrong checksum: the channel does not carry bytes
    unchanged (a terminal in between, a program that prints into it)."""

    code = "TM-0604"
    fix = "Use an --rsh that passes bytes unchanged (ssh without -t); nothing else may print to stdout at the target."


class LinkLost(TcpmigError):
    """The channel to the other host ended while the migration was under way: the remote shell, its network or the
    program at its other end died."""

    code = "TM-0605"
    fix = "Read the remote command's last lines above; try again when the path to HOST is stable."


class LinkSilent(TcpmigError):
    """The other side said nothing for longer than the time limit, or took nothing of what was sent to it."""

    code = "TM-0606"
    fix = "Check the load of the target and the path to it; try again."


class RemoteStartFailed(TcpmigError):
    """The command that --rsh names could not be started, or it ended before the target answered: the host is
    unreachable or unknown, the login was refused, or tcpmig is not installed there."""

    code = "TM-0607"
    outcome = Outcome.REFUSED
    fix = "Make `CMD HOST tcpmig --version` work with the same --rsh first (ssh: a key, a known host key)."


class TargetRefused(TcpmigError):
    """The target's check found something that it cannot do for this process tree. Nothing was stopped or built."""

    code = "TM-0608"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig check PID --to HOST` for all verdicts."


class TargetAborted(TcpmigError):
    """The target could not rebuild or start the processes and gave up before anything of them ran there. The original
    was resumed, with its connections and addresses."""

    code = "TM-0609"
    fix = "Read the target's message; the original runs on here."


class SourceAborted(TcpmigError):
    """The source gave up before COMMIT. Nothing was left on this host; the original runs on where it ran."""

    code = "TM-0610"
    fix = "Read the source's message."


class InDoubt(TcpmigError):
    """The channel was lost after COMMIT was sent and before the target said whether it runs the processes. Both sides
    hold: the original stays stopped and silent, so that there are never two running copies."""

    code = "TM-0611"
    outcome = Outcome.IN_DOUBT
    fix = (
        "Run `tcpmig recover` here when HOST can be reached again: it asks the target, and finishes or undoes the move."
    )


class PreparedDiffers(TcpmigError):
    """The target read the rebuilt connections back and they are not what was sent. Nothing was committed."""

    code = "TM-0612"
    fix = "Report it with the log: it names the connection, the item, and both values."


class TargetStuck(TcpmigError):
    """The target failed after it had begun to release the connections. It can no longer give the processes back, and
    holds what it has; the original is held as well."""

    code = "TM-0615"
    outcome = Outcome.IN_DOUBT
    fix = "Run `tcpmig recover` on the target, then here."


class AnotherMachine(TcpmigError):
    """The processes use something that the target's machine or kernel does not have: another architecture, instructions
    that its CPU lacks, a larger register state, a kernel interface."""

    code = "TM-0616"
    outcome = Outcome.REFUSED
    fix = "Move to a host with the named feature, or start the application with it disabled."


class RshSyntax(TcpmigError):
    """--rsh is split into words as a shell would do it, and this one has an open quote or no word; or HOST is empty or
    starts with a dash, and would be taken for an option."""

    code = "TM-0617"
    outcome = Outcome.USAGE
    fix = "Quote it once for the shell: --rsh 'ssh -p 2222'."


class KeptFramesLost(TcpmigError):
    """The tool died while it released rebuilt connections, and what it kept of them in the runtime directory cannot be
    read: the bytes that they had not sent yet are not known."""

    code = "TM-0635"
    fix = "Decide with `tcpmig recover ID --assume here|there`; connections that were not released will be reset."


class UnitHookFailed(TcpmigError):
    """The program that --unit-hook names could not be started, ended with another status than 0, or took longer than 30
    seconds. Before the commit that ends the move: nothing had been stopped, and the hook was called again with
    `aborted`. Afterwards it is only told."""

    code = "TM-0711"
    outcome = Outcome.REFUSED
    fix = "Run the program by hand with the environment that docs/guide/migrating.md names; its output is in the log."


class UnitHookSyntax(TcpmigError):
    """--unit-hook is split into words as a shell would do it, and this one has an open quote or no word."""

    code = "TM-0712"
    outcome = Outcome.USAGE
    fix = "Quote it once for the shell: --unit-hook '/etc/tcpmig/hook --verbose'."


class SameHost(TcpmigError):
    """--from names this very host. What it holds is taken back without that."""

    code = "TM-0629"
    outcome = Outcome.USAGE
    fix = "Run `tcpmig restore FILE`."
