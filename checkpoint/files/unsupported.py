"""Open files that cannot be moved, refused by name.

The last rules of the register: what reaches them has no kind of its own. A record of this kind is never written.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final, Self

from checkpoint.errors import UnsupportedFile, UnsupportedProtocol
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.external import is_terminal
from checkpoint.files.regular import is_message_queue
from checkpoint.files.sockopts import IPPROTO_MPTCP
from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Unsupported", "why"]

#: what a link tells, in the order of looking
_LINKS: Final = (
    (r"anon_inode:\[io_uring\]", "io_uring"),
    (r"anon_inode:\[userfaultfd\]", "userfaultfd"),
    (r"anon_inode:\[perf_event\]", "perf event"),
    (r"anon_inode:\[?bpf.*", "BPF program, map or link"),
    (r"anon_inode:\[?kvm.*", "virtual machine (KVM)"),
    (r"anon_inode:seccomp notify", "seccomp notifier"),
    (r"anon_inode:\[?landlock.*", "landlock ruleset"),
    (r"anon_inode:\[?secretmem.*|/secretmem.*", "secret memory"),
    (r"anon_inode:.*", "anonymous file of the kernel"),
    (r"(net|mnt|pid|ipc|uts|user|cgroup|time)(_for_children)?:\[\d+\]", "namespace"),
    (r"/SYSV.*", "System V shared memory"),
    (r"/\[aio\].*", "asynchronous I/O context"),
    (r"/anon_hugepage.*", "huge pages"),
    (r"/dev/fuse", "FUSE connection"),
)

#: address families (linux/socket.h)
_FAMILIES: Final = {
    38: "socket of the crypto interface (AF_ALG)",
    40: "vsock socket",
    44: "XDP socket",
    31: "bluetooth socket",
    29: "CAN socket",
    30: "TIPC socket",
}


#: protocols of internet sockets (uapi linux/in.h)
_PROTOCOLS: Final = {33: "DCCP", 132: "SCTP", 136: "UDP-Lite"}


def why(view: FdView) -> TcpmigError:
    """The refusal of a file without a kind."""
    if stat.S_ISSOCK(view.stat.st_mode):
        return _socket(view)
    if is_message_queue(view):
        return UnsupportedFile(f"POSIX message queue ({view.link})", object=view.object)
    for pattern, name in _LINKS:
        if re.fullmatch(pattern, view.link, re.DOTALL):
            return UnsupportedFile(f"{name} ({view.link})", object=view.object)
    if is_terminal(view):
        return UnsupportedFile(f"terminal that is not a standard stream ({view.link})", object=view.object)
    mode = view.stat.st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        kind = "character" if stat.S_ISCHR(mode) else "block"
        number = f"{os.major(view.stat.st_rdev)}:{os.minor(view.stat.st_rdev)}"
        return UnsupportedFile(f"{kind} device {number} ({view.link})", object=view.object)
    return UnsupportedFile(f"open file of an unknown kind ({view.link})", object=view.object)


def _socket(view: FdView) -> TcpmigError:
    if view.dup < 0:
        return UnsupportedFile(f"mapping of a socket ({view.link})", object=view.object)
    sock = view.socket
    if sock.proto == IPPROTO_MPTCP:
        return UnsupportedProtocol("Multipath TCP connection", object=view.object)
    named = _FAMILIES.get(int(sock.family))
    if named is not None:
        return UnsupportedFile(f"{named} (protocol {sock.proto})", object=view.object)
    name = f"{_PROTOCOLS[sock.proto]} socket" if sock.proto in _PROTOCOLS else "socket"
    return UnsupportedProtocol(
        f"{name} of family {int(sock.family)}, type {int(sock.type)}, protocol {sock.proto}", object=view.object
    )


@register("unsupported", link=r".*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported(OpenFile):
    """Takes every file that no other kind took, and refuses it."""

    @classmethod
    def examine(cls, view: FdView) -> str:
        raise why(view)

    @classmethod
    def capture(cls, view: FdView) -> Self:
        raise why(view)
