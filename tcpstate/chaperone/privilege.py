"""The chaperone's own privileges: what it needs, and the end of all others.

===================  =================================================================================================
CAP_NET_ADMIN        repair mode, marks, blackhole rules
CAP_NET_RAW          AF_PACKET (what arrives meanwhile), raw sockets (its replay, FINs put back)
CAP_SYS_PTRACE       pidfd_getfd and /proc/PID/fdinfo of other users' processes
CAP_CHOWN            a rebuilt socket belongs to its owner (fchown of a socket)
CAP_NET_BIND_SERVICE only if privileged ports are allowed
===================  =================================================================================================

Source: capabilities(7), PR_CAPBSET_DROP, securebits.
"""

from __future__ import annotations

import ctypes
import os
import pwd
from collections.abc import Collection
from pathlib import Path
from typing import Final

from tcpstate.errors import MissingCapability
from tcpstate.kernel import batch
from tcpstate.kernel.capability import CAPABILITY_BITS, Cap, capset_data, capset_header, names
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import CapAmbient, Pr, Securebit

__all__ = ["NEEDED", "drop", "held", "needed"]

NEEDED: Final = frozenset({Cap.NET_ADMIN, Cap.NET_RAW, Cap.SYS_PTRACE, Cap.CHOWN})
#: no program that is executed, and no change of user IDs, brings any back
_SECUREBITS: Final = (
    Securebit.NOROOT
    | Securebit.NOROOT_LOCKED
    | Securebit.NO_SETUID_FIXUP
    | Securebit.NO_SETUID_FIXUP_LOCKED
    | Securebit.KEEP_CAPS_LOCKED
    | Securebit.NO_CAP_AMBIENT_RAISE
    | Securebit.NO_CAP_AMBIENT_RAISE_LOCKED
)


def needed(low_ports: Collection[int]) -> frozenset[Cap]:
    """What a chaperone with this policy keeps."""
    return NEEDED | {Cap.NET_BIND_SERVICE} if low_ports else NEEDED


def held(which: str) -> int:
    """The calling process's set, as /proc/self/status shows it: ``CapEff``, ``CapPrm``, ``CapBnd``, ``CapInh``,
    ``CapAmb``."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value, 16)
    raise MissingCapability("/proc/self/status does not tell the capabilities", object=which)


def drop(keep: Collection[Cap], user: str | None = None) -> None:
    """Keep these capabilities and nothing else, in every set, for good; become ``user``.

    MissingCapability: one of them is not there to be kept; the process is as it was. KeyError: no such user. OSError.
    """
    mask = sum(1 << cap for cap in keep)
    missing = mask & ~held("CapPrm")
    if missing:
        raise MissingCapability("the chaperone needs it", object=names(missing))
    account = pwd.getpwnam(user) if user is not None else None
    # a service manager may have done these two, and taken the capability for them
    if held("CapEff") >> Cap.SETPCAP & 1:
        for bit in range(CAPABILITY_BITS):
            if held("CapBnd") >> bit & 1 and not mask >> bit & 1:
                _prctl(Pr.CAPBSET_DROP, bit)
        _prctl(Pr.SET_SECUREBITS, _SECUREBITS | Securebit.KEEP_CAPS)
    if account is not None:
        if not _kept_anyway():
            _prctl(Pr.SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    _prctl(Pr.CAP_AMBIENT, CapAmbient.CLEAR_ALL)
    header = ctypes.create_string_buffer(capset_header())
    data = ctypes.create_string_buffer(capset_data(effective=mask, permitted=mask, inheritable=0))
    batch.syscall(SYS.capset, ctypes.addressof(header), ctypes.addressof(data))
    _prctl(Pr.SET_NO_NEW_PRIVS, 1)
    # nobody of the same user may trace it
    _prctl(Pr.SET_DUMPABLE, 0)
    left = held("CapEff")
    if left != mask:
        raise MissingCapability("the kernel did not leave it", object=names(left ^ mask))


def _kept_anyway() -> bool:
    """Whether a change of user IDs leaves the capabilities alone already (and the bit that says so is locked)."""
    return bool(_prctl(Pr.GET_SECUREBITS) & (Securebit.NO_SETUID_FIXUP | Securebit.KEEP_CAPS))


def _prctl(option: Pr, *values: int) -> int:
    # some options refuse a call whose unused arguments are not 0
    return batch.syscall(SYS.prctl, option, *values, *[0] * (4 - len(values)))
