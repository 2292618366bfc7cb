"""Can this host do it at all? Capabilities, and what of the kernel is used (docs/reference/kernel.md), each tried.

Everything is tried on our own process and on sockets of ours: nothing of the host is stopped or changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.kernel import pagemap, process_vm
from checkpoint.kernel.kcmp import KcmpType, kcmp
from checkpoint.verdict import Status, Verdict
from tcpstate import acceptqueue, softstate
from tcpstate.errors import KernelFeatureMissing, MissingCapability
from tcpstate.kernel import bpf, diag, route
from tcpstate.kernel.capability import Cap
from tcpstate.kernel.sockets import IP, SO, Level, pidfd_getfd
from tcpstate.kernel.tcp import TCP, Repair
from tcpstate.silence import MARK

__all__ = ["FEATURES", "NEEDED", "check", "first_user"]

#: capability: what it is needed for
NEEDED: Final = {
    Cap.SYS_PTRACE: "stopping processes and reading their memory",
    Cap.NET_ADMIN: "repair mode, marks, addresses",
    Cap.NET_RAW: "capturing what arrives meanwhile",
    Cap.SYS_ADMIN: "the same PIDs, mapped files, time namespaces",
}
_CAPABILITY = "capability"
_FEATURE = "kernel feature"


def check() -> list[Verdict]:
    """A verdict on every capability and every feature of the kernel that is needed."""
    effective = int(procfs.read_status(os.getpid())["CapEff"], 16)
    found = [_capability(cap, purpose, effective) for cap, purpose in NEEDED.items()]
    found += [_feature(name, probe) for name, probe in FEATURES.items()]
    found.append(_page_scan())
    found.append(_extra("soft state", softstate.missing, "congestion windows are lost in a move, slow start anew"))
    found.append(
        _extra(
            "accept queues", acceptqueue.missing, "connections that wait to be accepted must be accepted before a move"
        )
    )
    return found


def _capability(cap: Cap, purpose: str, effective: int) -> Verdict:
    name = f"CAP_{cap.name}"
    if effective >> cap & 1:
        return Verdict(subject=name, kind=_CAPABILITY, text=f"for {purpose}")
    return Verdict.refuse(MissingCapability(f"missing: it is needed for {purpose}", object=name), _CAPABILITY)


def _feature(name: str, probe: Callable[[], None]) -> Verdict:
    try:
        probe()
    except PermissionError as error:
        # the capabilities tell why
        text = f"could not be tried: {error.strerror}"
        return Verdict(subject=name, kind=_FEATURE, status=Status.WARN, text=text, fix="Try again as root.")
    except OSError as error:
        missing = KernelFeatureMissing(f"this kernel does not have it ({error.strerror})", object=name)
        return Verdict.refuse(missing, _FEATURE)
    return Verdict(subject=name, kind=_FEATURE)


def _page_scan() -> Verdict:
    name = "PAGEMAP_SCAN"
    try:
        with _descriptor(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as fd:
            pagemap.scan(fd, 0, os.sysconf("SC_PAGE_SIZE"), any_of=pagemap.Category.PRESENT)
    except OSError:
        text = "absent: pages are found by reading /proc/PID/pagemap, slower"
        return Verdict(subject=name, kind=_FEATURE, status=Status.WARN, text=text, fix="A kernel from 6.7 on has it.")
    return Verdict(subject=name, kind=_FEATURE)


def _extra(name: str, missing: Callable[[], KernelFeatureMissing | None], otherwise: str) -> Verdict:
    """On what is used where it is there."""
    lack = missing()
    if lack is None:
        return Verdict(subject=name, kind=_FEATURE)
    text = f"{lack.message}: {otherwise}"
    return Verdict(subject=name, kind=_FEATURE, status=Status.WARN, text=text, fix=lack.fix)


# --- what is tried ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _repair() -> None:
    with socket.socket() as sock:
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)


def _mark() -> None:
    with socket.socket() as sock:
        sock.setsockopt(Level.SOCKET, SO.MARK, MARK)


def _transparent() -> None:
    with socket.socket() as sock:
        sock.setsockopt(Level.IP, IP.TRANSPARENT, 1)


def _filter() -> None:
    with socket.socket() as sock:
        bpf.attach(sock, bpf.DROP_ALL)


def _packet() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def _sock_diag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not any(found.local_port == port for found in diag.dump(local_port=port)):
            raise OSError(0, "a listener of ours is not listed")


def _rules() -> None:
    route.blackhole_rules(socket.AF_INET, MARK)


def _pidfd_getfd() -> None:
    with _descriptor(os.pidfd_open(os.getpid())) as pidfd:
        os.close(pidfd_getfd(pidfd, pidfd))


def _kcmp() -> None:
    kcmp(os.getpid(), os.getpid(), KcmpType.VM)


def _process_vm() -> None:
    here = ctypes.create_string_buffer(b"x", 1)
    there = ctypes.create_string_buffer(1)
    process_vm.readv(os.getpid(), ctypes.addressof(there), [(ctypes.addressof(here), 1)])


def _map_files() -> None:
    # CONFIG_CHECKPOINT_RESTORE of older kernels; reading a link of it takes a capability
    directory = Path("/proc/self/map_files")
    os.readlink(next(directory.iterdir()))


def _time_namespace() -> None:
    os.readlink("/proc/self/ns/time_for_children")


def _set_tid() -> None:
    # the sysctl comes with CONFIG_CHECKPOINT_RESTORE, as does setting numbers
    os.stat("/proc/sys/kernel/ns_last_pid")


FEATURES: Final[dict[str, Callable[[], None]]] = {
    "TCP_REPAIR": _repair,
    "SO_MARK": _mark,
    "IP_TRANSPARENT": _transparent,
    "socket filter": _filter,
    "AF_PACKET": _packet,
    "sock_diag": _sock_diag,
    "routing rules": _rules,
    "pidfd_getfd": _pidfd_getfd,
    "kcmp": _kcmp,
    "process_vm_readv": _process_vm,
    "map_files": _map_files,
    "time namespaces": _time_namespace,
    "setting PIDs": _set_tid,
}


def first_user(numbers: Iterable[int]) -> tuple[int, str] | None:
    """(number, by what) of the first of ``numbers`` that is in use here, as process, thread, group or session."""
    groups: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = procfs.read_stat(int(name))
            except NoSuchProcess:
                continue
            groups |= {stat.pgid, stat.sid}
    for number in numbers:
        # /proc/N is there for the number of every thread, although only processes are listed
        if number in groups or os.path.exists(f"/proc/{number}"):
            users = procfs.users_of_number(number)
            return number, users[0] if users else "a process that has just ended"
    return None
