"""Errors of connections that are forwarded to another host."""

from __future__ import annotations

from tcpstate.errors import Outcome, TcpmigError

__all__ = [
    "ForwardChangeFailed",
    "ForwardEndUnknown",
    "ForwardPathBroken",
    "ForwardUnavailable",
    "ForwardedElsewhere",
    "NothingToForward",
]


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
