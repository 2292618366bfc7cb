"""Which namespaces of a tree can move with it, judged before anything is stopped.

The tree's root decides what is the tree's own; everybody else has to be where the root is, and nobody else may be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from checkpoint import procfs
from checkpoint.errors import (
    NamespaceShared,
    NamespacesMoveAlone,
    NestedNamespace,
    NoSuchProcess,
    NotTheInit,
)
from checkpoint.namespaces import users
from checkpoint.namespaces.ipc import left_over
from checkpoint.namespaces.mountlook import judge
from checkpoint.namespaces.spaces import (
    Kind,
    cgroup_roots,
    entered,
    inside,
    network_reasons,
    own_kinds,
    same_space,
    unified,
)
from checkpoint.tree import INIT
from checkpoint.verdict import Status, Verdict
from tcpstate.errors import TcpmigError

__all__ = ["verdicts"]

#: nobody else may be in them: the others are copied, and stay where they are
_ALONE: Final = frozenset({Kind.PID})
#: what a process's children would be in, beside what it is in itself
_FOR_CHILDREN: Final = ("pid", "time")


def verdicts(roots: Sequence[int], members: Sequence[int]) -> list[Verdict]:
    """One verdict for each kind of namespace that is the trees' own, and one for each process that is in another one.

    members  all processes of the trees
    """
    own = {root: own_kinds(root) for root in roots}
    kinds = frozenset.union(*own.values())
    found: list[Verdict] = []
    if len(roots) > 1 and kinds:
        names = ", ".join(sorted(kinds))
        error = NamespacesMoveAlone(
            f"of several trees one has namespaces of its own ({names})", object=f"pid {roots[0]}"
        )
        return [Verdict.refuse(error, "namespace")]
    for root in roots:
        for kind in sorted(own[root]):
            found += _judge(kind, root, members)
        for pid in procfs.tree(root):
            with contextlib.suppress(NoSuchProcess):
                found += list(_apart(pid, root))
    return found


def _judge(kind: Kind, root: int, members: Sequence[int]) -> Iterator[Verdict]:
    name, what = f"pid {root}", f"{kind} namespace"
    if kind is Kind.CGROUP and cgroup_roots(root) is None:
        text = "it has left what its cgroup namespace shows; the rebuilt process will see all of the host's cgroups"
        yield Verdict(subject=name, kind=what, status=Status.WARN, text=text)
        return
    if kind is Kind.PID:
        numbers = procfs.read_status(root)["NSpid"].split()
        if len(numbers) > 2:
            deep = NestedNamespace(f"it is {len(numbers) - 1} PID namespaces below tcpmig's", object=name)
            yield Verdict.refuse(deep, what)
            return
        if int(numbers[-1]) != INIT:
            inner = NotTheInit(f"it has the number {numbers[-1]} in a PID namespace", object=name)
            yield Verdict.refuse(inner, what)
            return
    reasons: Iterable[TcpmigError] = ()
    if kind is Kind.MNT:
        cgroup = cgroup_roots(root) if Kind.CGROUP in own_kinds(root) else None
        reasons = judge(root, unified(cgroup))
    elif kind is Kind.IPC:
        with inside(root, kind):
            reasons = list(left_over())
    elif kind is Kind.NET:
        with entered(root):
            reasons = network_reasons()
    elif kind is Kind.USER:
        reasons = users.judge(root, own_kinds(root) - {Kind.USER}, procfs.tree(root))
    bad = [Verdict.refuse(error, what) for error in reasons]
    if bad:
        yield from bad
        return
    others = _others(kind, root, members) if kind in _ALONE else []
    if others:
        shown = ", ".join(f"pid {pid}" for pid in others[:3])
        yield Verdict.refuse(NamespaceShared(f"{shown} outside of the tree is in its {what}, too", object=name), what)
        return
    yield Verdict(subject=name, kind=what, text="of its own: a new one is made for the rebuilt tree")


def _others(kind: Kind, root: int, members: Sequence[int]) -> list[int]:
    """Processes outside of the trees that are in a namespace of a root."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in members:
            with contextlib.suppress(NoSuchProcess, PermissionError):
                # a child that was born meanwhile is of the tree
                if same_space(kind, int(name), root) and root not in procfs.parents(int(name)):
                    found.append(int(name))
    return found


def _apart(pid: int, root: int) -> Iterator[Verdict]:
    """On a process that is elsewhere than its root."""
    if not procfs.lives(pid):
        return
    for name in (*Kind, "time"):
        if pid != root and not same_space(name, pid, root):
            error = NestedNamespace(f"it is in another {name} namespace than pid {root}", object=f"pid {pid}")
            yield Verdict.refuse(error, f"{name} namespace")
    for name in _FOR_CHILDREN:
        if not _same_for_children(name, pid):
            error = NestedNamespace(
                f"its children would be in another {name} namespace than itself", object=f"pid {pid}"
            )
            yield Verdict.refuse(error, f"{name} namespace")


def _same_for_children(name: str, pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/{pid}/ns/{name}_for_children")
    except FileNotFoundError:
        # the process ends; a kernel without this kind; or a namespace whose first process has not been born
        return name == "time" or not procfs.lives(pid)
