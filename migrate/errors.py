"""Errors of the migration (TM-06xx) and of addresses (TM-07xx). See :mod:`tcpstate.errors` for the tree."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError, catalogue

__all__ = [
    "AddressCarriesControl",
    "AddressChangeFailed",
    "AddressConfiguredTwice",
    "AddressElsewhere",
    "AddressInUseByOthers",
    "AddressNotHere",
    "AddressNotLocal",
    "AddressNotMovable",
    "AddressNotTaken",
    "AddressRestoreIncomplete",
    "AddressSyntax",
    "AddressTakenAtTarget",
    "AddressUsedByHost",
    "AnotherMachine",
    "BadFrame",
    "ForwardChangeFailed",
    "ForwardEndUnknown",
    "ForwardPathBroken",
    "ForwardUnavailable",
    "ForwardedElsewhere",
    "HandoverFailed",
    "HandoverUnknown",
    "HoldBusy",
    "HoldChanged",
    "HoldElsewhere",
    "HoldRecordDamaged",
    "HoldUnavailable",
    "HolderFailed",
    "InDoubt",
    "JournalDamaged",
    "JournalInUse",
    "JournalUnusable",
    "KeptFramesLost",
    "LinkLost",
    "LinkSilent",
    "MoveDied",
    "NoInterfaceForAddress",
    "NoSuchHold",
    "NotHeld",
    "NotInDoubt",
    "NotTcpmig",
    "NothingMatches",
    "NothingToForward",
    "NothingToRecover",
    "NothingToTakeOver",
    "PageBringerFailed",
    "PageLineLost",
    "PagesPending",
    "PreparedDiffers",
    "ProtocolError",
    "RecoverIncomplete",
    "RemoteStartFailed",
    "RshSyntax",
    "SameHost",
    "SourceAborted",
    "TakeoverHookRefused",
    "TakeoverHookSyntax",
    "TargetAborted",
    "TargetRefused",
    "TargetStuck",
    "UnitHookFailed",
    "UnitHookSyntax",
    "Unsettled",
    "VersionMismatch",
    "WritesTooFast",
    "from_remote",
    "refused",
    "undone",
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


class JournalUnusable(TcpmigError):
    """The journal, which must survive a crash, cannot be created or written in the state directory."""

    code = "TM-0613"
    outcome = Outcome.REFUSED
    fix = "Make the directory writable, free some space, or name another one in TCPMIG_STATE_DIR."


class JournalDamaged(TcpmigError):
    """A journal has a record in its middle whose checksum is wrong (a torn last record is normal after a crash, and
    tolerated)."""

    code = "TM-0614"
    fix = "Look at the disk; settle the migration by hand with `tcpmig recover ID --assume here|there`."


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


class Unsettled(TcpmigError):
    """`tcpmig recover` left something as it is: the other host could not be asked, does not know, or holds the
    processes itself and could not go on with them. The original, if it is on this host, stays stopped and silent, so
    that there are never two running copies."""

    code = "TM-0636"
    outcome = Outcome.IN_DOUBT
    fix = (
        "Run it again when the other host can be reached, or run `tcpmig recover` there. If that host is gone for "
        "good, decide: `tcpmig recover ID --assume here` or `--assume there`."
    )


class NothingToRecover(TcpmigError):
    """No journal of this host that is not settled yet has this name, or several begin with it."""

    code = "TM-0637"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig recover --dry-run` for what is not settled on this host."


class NotInDoubt(TcpmigError):
    """--assume decides what nobody knows. Of this one it is known where the processes are, so that nothing is to be
    decided."""

    code = "TM-0638"
    outcome = Outcome.REFUSED
    fix = "Run `tcpmig recover ID` without --assume."


class RecoverIncomplete(TcpmigError):
    """A step of `tcpmig recover` failed; all others were made. What is left to be done stays in the journal."""

    code = "TM-0639"
    fix = "Mend what is named, and run `tcpmig recover` again."


class AddressElsewhere(TcpmigError):
    """An address that is to be added here is answered for by another machine on the link: most likely the processes run
    there. If it were added here as well there would be two copies."""

    code = "TM-0640"
    outcome = Outcome.IN_DOUBT
    fix = "Look at that machine first. If it has the address by mistake, remove it there and run this again."


class JournalInUse(TcpmigError):
    """The program that writes this journal is still at work, or another `tcpmig recover` is settling it."""

    code = "TM-0641"
    outcome = Outcome.REFUSED
    fix = "Wait until it has ended, or end it, and run `tcpmig recover` again."


class AddressNotHere(TcpmigError):
    """A connection's local address is not configured on any interface of this network namespace (a transparent or
    any-address bind), or the address given with --address is not here. It cannot be moved."""

    code = "TM-0701"
    outcome = Outcome.REFUSED
    fix = "Give the addresses to move with --address, or --address none and move them yourself."


class AddressCarriesControl(TcpmigError):
    """The address that would move carries the channel to the target or is the source address of the route to it.
    Moving it would cut the migration off from its own target."""

    code = "TM-0702"
    outcome = Outcome.REFUSED
    fix = "Give the service an address of its own, or reach HOST over another address (ssh -b, another name of HOST)."


class AddressInUseByOthers(TcpmigError):
    """Processes outside the tree have connections or bound sockets on the address that would move. They would lose
    it."""

    code = "TM-0703"
    outcome = Outcome.REFUSED
    fix = "Move those processes too, give the service its own address, or accept it with --address-policy allow."


class AddressTakenAtTarget(TcpmigError):
    """The address is already configured at the target, or a third machine on the target's link answers for it."""

    code = "TM-0704"
    outcome = Outcome.REFUSED
    fix = "Remove the address from the machine that has it; it may be left from an earlier move."


class NoInterfaceForAddress(TcpmigError):
    """No interface of the target that is up has an address in the same subnet, so that it is not known on which link
    the address belongs."""

    code = "TM-0705"
    outcome = Outcome.REFUSED
    fix = "Name the interface with --map-dev OLD=NEW."


class AddressChangeFailed(TcpmigError):
    """The kernel refused to add or remove an address or a route."""

    code = "TM-0706"
    fix = "Read the kernel's message; another program may manage the addresses of this interface."


class AddressNotLocal(TcpmigError):
    """The address was added but the kernel did not begin to treat it as local within the time limit."""

    code = "TM-0707"
    fix = "Look at the address with `ip addr`: the interface must be up, and duplicate detection must not have failed."


class AddressSyntax(TcpmigError):
    """An address is written as 10.0.0.5/24, fd00::5/64, or without the prefix length if it is configured here."""

    code = "TM-0708"
    outcome = Outcome.USAGE
    fix = "Write --address ADDR/LEN, --address auto or --address none."


class AddressRestoreIncomplete(TcpmigError):
    """After a move that was undone, or beside one that was done, an address or route of this host could not be put
    back as it was."""

    code = "TM-0709"
    fix = "Put back what is named with `ip addr` or `ip route`; another program may have changed it meanwhile."


class AddressNotMovable(TcpmigError):
    """The address belongs to one interface of one machine and cannot be taken along: it is link-local or multicast, or
    one that the kernel makes and renews itself: from a router's advertisements, or a temporary one (RFC 8981)."""

    code = "TM-0710"
    outcome = Outcome.REFUSED
    fix = "Give the service a global address that is configured by hand, or close the connection before the move."


class AddressUsedByHost(TcpmigError):
    """This host itself speaks from the address that would move: it is the preferred source of routes that everybody
    uses (`ip route .. src`), or a tunnel ends on it. The route or tunnel would be gone, or be another."""

    code = "TM-0713"
    outcome = Outcome.REFUSED
    fix = (
        "Give the service an address of its own, or accept it with --address-policy allow: its routes then go along, "
        "tunnels do not."
    )


class AddressConfiguredTwice(TcpmigError):
    """The address is configured on more than one interface of this host. One of them would keep it, and answer for
    it."""

    code = "TM-0714"
    outcome = Outcome.REFUSED
    fix = "Remove it from all interfaces but one, or name other addresses with --address."


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


class TakeoverHookRefused(TcpmigError):
    """The program that --takeover-hook names could not be started, ended with another status than 0, or took longer
    than it may (--takeover-limit) when it was asked whether the addresses can be moved. Nothing had been stopped, and
    it was called again with `undo`."""

    code = "TM-0790"
    outcome = Outcome.REFUSED
    fix = "Run the program by hand with TCPMIG_HOOK=check; its output is in the log."


class AddressNotTaken(TcpmigError):
    """The processes run on the target, and the program that --takeover-hook names failed to bring the addresses there:
    their clients do not reach them. It cannot be undone any more; the connections wait, and their peers send again as
    long as their own time-outs last."""

    code = "TM-0791"
    outcome = Outcome.PARTIAL
    fix = "Run `tcpmig recover` on the source as soon as the program can do it: it is called again with `take`."


class TakeoverHookSyntax(TcpmigError):
    """--takeover-hook is split into words as a shell would do it, and this one has an open quote or no word."""

    code = "TM-0792"
    outcome = Outcome.USAGE
    fix = "Quote it once for the shell: --takeover-hook '/etc/tcpmig/takeover --region eu'."


class NothingToTakeOver(TcpmigError):
    """--takeover-hook moves addresses, and none does: --address says so, or no connection and no listener of the
    processes tells which one is theirs. An address that stayed configured on the source would have it answer with
    resets until the program is done."""

    code = "TM-0793"
    outcome = Outcome.REFUSED
    fix = "Name the service's address with --address ADDR."


class ForwardUnavailable(TcpmigError):
    """--address forward takes a tunnel (vxlan), programs at the ingress of interfaces (tcx, Linux 6.6), and a BPF file
    system that they are kept in; one of these is not to be had on this host. Nothing was stopped."""

    code = "TM-0794"
    outcome = Outcome.REFUSED
    fix = (
        "Run as root on a kernel from 6.6 on with CONFIG_VXLAN and CONFIG_BPF_SYSCALL; `mount -t bpf bpf /sys/fs/bpf`."
    )


class ForwardPathBroken(TcpmigError):
    """A packet that was sent through the tunnel to the target, and back, did not arrive: a firewall drops UDP port
    47474, the address is not the target's, or packets of full size do not come through. Their tunnel packets are longer
    than a link carries; over IPv4 they are sent in fragments, over IPv6 they are dropped. Nothing was stopped."""

    code = "TM-0795"
    outcome = Outcome.REFUSED
    fix = (
        "Let UDP port 47474 through between the two addresses, name an IPv4 address with --forward-to, or raise the "
        "MTU between the hosts by 70 bytes."
    )


class ForwardedElsewhere(TcpmigError):
    """An address is forwarded, and what was asked for does not go with that: from where it is forwarded to, processes
    can only go home, all that use it at once, with --address forward; and one that is forwarded from here cannot be
    forwarded in another way. Nothing was stopped."""

    code = "TM-0796"
    outcome = Outcome.REFUSED
    fix = "Look at `tcpmig holds`; move the processes home first: tcpmig migrate PID.. HOME --address forward."


class NothingToForward(TcpmigError):
    """--address forward, and no connection and no bound listener of the processes tells which addresses are theirs."""

    code = "TM-0797"
    outcome = Outcome.REFUSED
    fix = "Give the service an address to listen on, or use --address none if nobody has to find it on HOST."


class ForwardEndUnknown(TcpmigError):
    """A tunnel ends on an address of either host, and that of the target is not known: its name cannot be resolved
    here, or stands for an address that it does not have."""

    code = "TM-0798"
    outcome = Outcome.REFUSED
    fix = "Name an address of HOST that this host reaches it by: --forward-to ADDR."


class ForwardChangeFailed(TcpmigError):
    """The kernel refused a change to a tunnel or to the programs that steer connections into it, or the runtime
    directory one to its record. Before the commit everything was undone."""

    code = "TM-0799"
    fix = "Read the reason in the message; `tcpmig holds` shows what stands, `tcpmig recover` settles what was begun."


def from_remote(
    code: str, message: str, object: str, fix: str, *, otherwise: type[TcpmigError], where: str = "target"
) -> TcpmigError:
    """The error that the other host reported, under its own code where this program knows it, else as ``otherwise``."""
    cls = catalogue().get(code, otherwise)
    # past the subclass's own constructor, whose arguments are not known here
    error = cls.__new__(cls)
    TcpmigError.__init__(error, f"{where}: {message}" if where else message, object=object, fix=fix or None)
    return error


def undone(error: TcpmigError) -> TcpmigError:
    """The same error, ending the command as a failure: what it refused was found after the stop, and is undone."""
    if error.outcome in (Outcome.REFUSED, Outcome.USAGE):
        # of this one error, not of its class
        error.__dict__["outcome"] = Outcome.FAILED
    return error


def refused(error: TcpmigError) -> TcpmigError:
    """The same error, ending the command as a refusal: what failed was only tried, and nothing was stopped or built."""
    if error.outcome is Outcome.FAILED:
        error.__dict__["outcome"] = Outcome.REFUSED
    return error


class HoldUnavailable(TcpmigError):
    """A checkpoint that ends the processes holds their connections, and something that this takes is not to be had: the
    kernel has no nf_tables, the runtime directory cannot be written, or others may write into it. Nothing was
    stopped."""

    code = "TM-0620"
    outcome = Outcome.REFUSED
    fix = "Load nf_tables, mend TCPMIG_RUNTIME_DIR, or let the processes run on (-R)."


class HolderFailed(TcpmigError):
    """The process that keeps held sockets did not start, or the line to it broke."""

    code = "TM-0621"
    fix = "Read its log (*-hold-*.log in TCPMIG_STATE_DIR/log); `tcpmig holds` shows what stands."


class NoSuchHold(TcpmigError):
    """There is no hold of this ID: it was restored, released, or its time was up; or the beginning of an ID was given
    that several have."""

    code = "TM-0622"
    outcome = Outcome.REFUSED
    fix = "See `tcpmig holds`."


class HoldBusy(TcpmigError):
    """Another command is at work on this hold: its checkpoint, a restore, a release."""

    code = "TM-0623"
    outcome = Outcome.REFUSED
    fix = "Wait until it has ended; `tcpmig holds` tells."


class HoldRecordDamaged(TcpmigError):
    """A file in the runtime directory is no record of a hold, or belongs to another user."""

    code = "TM-0624"
    fix = "Look at the file; remove it if it is not ours. What the hold was shows in `nft list tables`."


class HoldChanged(TcpmigError):
    """The holder gave a socket that is not the one which the image names: the image is another one than that of the
    checkpoint, or one of the two was changed."""

    code = "TM-0625"
    outcome = Outcome.REFUSED
    fix = "Restore the image that the checkpoint wrote; `tcpmig holds` names its path."


class HoldElsewhere(TcpmigError):
    """The other host does not hold the connections of this image: they were restored or released there, their time was
    up, or HOST is not where the checkpoint was made. Nothing was built."""

    code = "TM-0626"
    outcome = Outcome.REFUSED
    fix = "If the addresses are free (`ping`), restore without --from; else see `tcpmig holds` on HOST."


class HandoverFailed(TcpmigError):
    """The other host could not give up the connections that it holds, or their addresses. It holds them as before."""

    code = "TM-0627"
    fix = "Read its message; nothing is left here, and the image can be restored again."


class HandoverUnknown(TcpmigError):
    """The line broke after the other host was told to give up the hold, and before it said that it had. Nothing runs
    here or there: the processes are in the image, and nobody answers their peers, who keep trying."""

    code = "TM-0628"
    fix = "Run the same command again; if HOST is gone for good, run it without --from."


class SameHost(TcpmigError):
    """--from names this very host. What it holds is taken back without that."""

    code = "TM-0629"
    outcome = Outcome.USAGE
    fix = "Run `tcpmig restore FILE`."


class NotHeld(TcpmigError):
    """--from was given, and this image's connections were never held: its checkpoint let the processes run on, or they
    had none."""

    code = "TM-0630"
    outcome = Outcome.USAGE
    fix = "Run `tcpmig restore FILE`."


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
