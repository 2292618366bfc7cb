"""Errors of namespaces and of the numbers, mounts and networks in them."""

from __future__ import annotations

from checkpoint.errors.tree import Refused
from tcpstate.errors import TcpmigError

__all__ = [
    "BridgeMissing",
    "IdOutsideOfMap",
    "MemoryFilesTooLarge",
    "MountNotMovable",
    "NamespaceNotMade",
    "NamespaceShared",
    "NamespacesMoveAlone",
    "NestedNamespace",
    "NetworkNotMovable",
    "NotTheInit",
    "NumbersInUserNamespace",
    "OwnedFromOutside",
    "SharedInUserNamespace",
]


class NestedNamespace(Refused):
    """A process of the tree is in a namespace of its own below or beside those of the tree's root. Only namespaces
    that the whole tree is in can be made again."""

    code = "TM-0720"
    fix = "Run tcpmig inside the outer namespace (nsenter), on both hosts, and name the inner tree."


class NotTheInit(Refused):
    """The process is in a PID namespace, but is not the first process in there. When that one ends, the kernel ends all
    others of the namespace: they move together or not at all."""

    code = "TM-0721"
    fix = "Name the first process of its PID namespace (`lsns -t pid` shows it), or run tcpmig inside (nsenter)."


class NamespaceShared(Refused):
    """Processes outside of the tree are in a namespace that would move with the tree: what they share with it would be
    in two places. They may have been put there by nsenter, or by a container engine."""

    code = "TM-0722"
    fix = "End those processes, or name a process that they all descend from."


class NamespacesMoveAlone(Refused):
    """Several trees were named at once, and one of them has namespaces of its own. Such a tree moves alone."""

    code = "TM-0723"
    fix = "Name that tree alone, and the others in another command."


class NamespaceNotMade(TcpmigError):
    """The kernel refused to make a namespace for the rebuilt processes, or to give it what the original's had: a limit
    of namespaces, a missing capability, or another user namespace. Nothing is left of it."""

    code = "TM-0724"
    fix = "See the named call; compare /proc/sys/user/max_*_namespaces of the two hosts, and run tcpmig as root."


class MountNotMovable(Refused):
    """The tree has a mount namespace of its own with a mount that cannot be made again: a disk that only the tree has
    mounted, an overlay of directories that the host has not by these paths, a file system in memory with devices in it
    or covered by another mount, mounts that propagate into other namespaces, something that is mounted over its root;
    or its first process has another root directory (chroot) than its mount namespace; or, of a user namespace, what
    cannot be mounted from inside again (an option gid=, pseudo terminals without a PID namespace)."""

    code = "TM-0726"
    fix = "Unmount it, or run tcpmig inside the namespaces (nsenter) on both hosts."


class NetworkNotMovable(Refused):
    """The tree has a network namespace of its own with something in it that cannot be made again: an interface other
    than a veth whose outer end is on this host, or rules of a packet filter."""

    code = "TM-0727"
    fix = "Take it away inside the namespace, or run tcpmig inside (nsenter), on both hosts."


class BridgeMissing(Refused):
    """A link of the tree's network namespace leads into a bridge, or into none, and there is no bridge of that name at
    the target."""

    code = "TM-0728"
    fix = "Name a bridge of the target: --veth NAME=BRIDGE, NAME being the link inside of the namespace."


class IdOutsideOfMap(Refused):
    """The tree has a user namespace of its own, and a process in it has a user or group ID that the namespace has no
    number for, or supplementary groups that it could not be given inside: nothing is mapped, or it came in from outside
    (nsenter). It would get another ID."""

    code = "TM-0810"
    fix = "Map the ID (newuidmap, newgidmap, `unshare --map-users`), or run tcpmig inside (nsenter), on both hosts."


class OwnedFromOutside(Refused):
    """The tree has a user namespace of its own, and another namespace of its own that does not belong to it, since it
    was made before: what root inside may do in there would be different in one that is made after."""

    code = "TM-0811"
    fix = "Make the user namespace first, or all at once, as `unshare --user --pid --mount ..` does."


class SharedInUserNamespace(Refused):
    """The tree has a user namespace of its own and no PID namespace, and two of its processes share their root and
    working directory (CLONE_FS). Each of them enters the namespace by itself, and the kernel lets none in that shares
    them."""

    code = "TM-0812"
    fix = "Start it with a PID namespace of its own, too: `unshare --user --pid --fork ..`."


class NumbersInUserNamespace(Refused):
    """A tree in a user namespace of its own was to get a PID namespace that it had not (--new-pid-namespace). That one
    would belong to the host, and processes inside could not be given their numbers in it."""

    code = "TM-0813"
    fix = "Free the numbers, or restore the image on a host where they are free."


class MemoryFilesTooLarge(Refused):
    """The tree has a mount namespace of its own with a file system in memory (tmpfs), and in it are more files, or
    larger ones, than can be read while the tree stands still."""

    code = "TM-0814"
    fix = "Remove what is not needed in it, or mount a directory of the host there instead."
