"""What anything here may need and not have."""

from __future__ import annotations

from tcpstate.errors.tree import Outcome, TcpmigError

__all__ = [
    "KernelFeatureMissing",
    "KernelReadRefused",
    "MissingCapability",
    "NotPermitted",
    "RepairNotPermitted",
]


class MissingCapability(TcpmigError):
    """The tool stops other processes, reads their memory and puts sockets in repair mode. That takes CAP_SYS_PTRACE,
    CAP_NET_ADMIN (in the user namespace that owns the network namespace) and CAP_SYS_ADMIN or
    CAP_CHECKPOINT_RESTORE. One of them is missing from the effective set."""

    code = "TM-0101"
    outcome = Outcome.REFUSED
    fix = "Run as root, or give the named capability to the program that runs tcpmig."


class NotPermitted(TcpmigError):
    """The kernel refused an operation although the capability is there: another user namespace, a security module, a
    tracer already attached."""

    code = "TM-0102"
    outcome = Outcome.REFUSED
    fix = "Run tcpmig in the user namespace that owns the object; check the security module's log."


class KernelFeatureMissing(TcpmigError):
    """This kernel lacks an interface that the operation needs. Features are probed, versions are never compared."""

    code = "TM-0103"
    outcome = Outcome.REFUSED
    fix = "Use a kernel with the named feature (see docs/reference/kernel.md)."


class RepairNotPermitted(TcpmigError):
    """The kernel does not let this caller put a TCP socket in repair mode, without which no connection can be read or
    rebuilt: CAP_NET_ADMIN in the user namespace that owns the network namespace is missing. Nothing was changed."""

    code = "TM-0251"
    outcome = Outcome.REFUSED
    fix = "Run as root of the user namespace that owns the network namespace."


class KernelReadRefused(TcpmigError):
    """Out-of-order data has no system call: it is read from kernel memory, which is only done when the caller says so
    (kernel_reads=True), for connections that are frozen. Or what was found there does not read as a queue of packets:
    the connection was not frozen, or this kernel lays its memory out in a way that is not known. Nothing was changed,
    and nothing is lost without it: the peer sends such data again."""

    code = "TM-0241"
    outcome = Outcome.REFUSED
    fix = "Leave it out; or freeze the connection first, and pass kernel_reads=True."
