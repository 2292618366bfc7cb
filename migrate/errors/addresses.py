"""Errors of addresses that move and of hooks that move them."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

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
    "NoInterfaceForAddress",
    "NothingToTakeOver",
    "TakeoverHookRefused",
    "TakeoverHookSyntax",
]


class AddressElsewhere(TcpmigError):
    """An address that is to be added here is answered for by another machine on the link: most likely the processes run
    there. If it were added here as well there would be two copies."""

    code = "TM-0640"
    outcome = Outcome.IN_DOUBT
    fix = "Look at that machine first. If it has the address by mistake, remove it there and run this again."


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
