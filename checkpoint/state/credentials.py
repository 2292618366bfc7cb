"""Who a thread is and what it may do: user and group IDs, supplementary groups, capabilities, securebits, no_new_privs.

Every thread has credentials of its own (the C library keeps them equal by changing all at once), so each rebuilds its
own, and last of all but what a change of credentials resets: everything before may need the privileges that end here.
Nothing is done where they are those that the new process was born with, for instance root's.

Order of the calls, each needing what the later ones take away:

1. securebits that keep the capabilities through the change of IDs
2. groups, group IDs, user IDs, those of file access
3. inheritable set, while the bounding set still allows it; then ambient; then the bounding set shrinks
4. the final securebits, then the final capabilities
5. no_new_privs

Capabilities that this host withholds (a bounding set of the tool that lacks them) cannot be given: told as a warning.

Source: Linux kernel/cred.c, security/commoncap.c; /proc/PID/status.  IDs are those of the tool's user namespace; in
another one the calls are made with the numbers that they have there (:mod:`checkpoint.namespaces.users`).
"""

from __future__ import annotations

import functools
import struct
from typing import Final, Self

from checkpoint.errors import StateRefused
from checkpoint.state import landlock
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.capability import CAPABILITY_BITS, capset_data, capset_header, names
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import CapAmbient, Pr, Securebit
from tcpstate.slotted import dataclass

__all__ = ["Capabilities", "Credentials", "Ids"]

#: NGROUPS_MAX, include/uapi/linux/limits.h
_GROUPS_MAX: Final = 65536
_ID_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class Ids:
    """Real, effective, saved and file-access IDs of users or groups."""

    real: int
    effective: int
    saved: int
    fs: int

    def __post_init__(self) -> None:
        for value in (self.real, self.effective, self.saved, self.fs):
            unsigned("user or group ID", value, _ID_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The five sets, as masks."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int

    def __post_init__(self) -> None:
        for value in (self.inheritable, self.permitted, self.effective, self.bounding, self.ambient):
            unsigned("capabilities", value, CAPABILITY_BITS)
        if self.effective & ~self.permitted or self.ambient & ~(self.permitted & self.inheritable):
            raise ValueError("capabilities that are effective or ambient without being permitted")

    def __and__(self, other: Capabilities) -> Capabilities:
        """What of these a thread with the capabilities ``other`` can pass on."""
        permitted = self.permitted & other.permitted
        inheritable = self.inheritable & (other.inheritable | other.bounding)
        return Capabilities(
            inheritable=inheritable,
            permitted=permitted,
            effective=self.effective & permitted,
            bounding=self.bounding & other.bounding,
            ambient=self.ambient & permitted & inheritable,
        )

    @classmethod
    def of(cls, status: dict[str, str]) -> Self:
        """The sets in a /proc/PID/status."""
        return cls(
            inheritable=int(status["CapInh"], 16),
            permitted=int(status["CapPrm"], 16),
            effective=int(status["CapEff"], 16),
            bounding=int(status["CapBnd"], 16),
            ambient=int(status["CapAmb"], 16),
        )


@register("credentials")
@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials(State):
    """All of it. ``groups`` are the supplementary ones, ``securebits`` as <linux/securebits.h> has them."""

    users: Ids
    group_ids: Ids
    groups: tuple[int, ...]
    capabilities: Capabilities
    securebits: int
    no_new_privs: bool

    def __post_init__(self) -> None:
        unsigned("securebits", self.securebits, _ID_BITS)
        if len(self.groups) > _GROUPS_MAX:
            raise ValueError(f"{len(self.groups)} supplementary groups")
        for gid in self.groups:
            unsigned("group ID", gid, _ID_BITS)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        status = task.status
        securebits = task.calls.call(SYS.prctl, Pr.GET_SECUREBITS, label="read the securebits")
        confined = landlock.ask(task)
        yield
        landlock.refuse_confined(task, confined)
        return cls.of(status, securebits.value)

    @classmethod
    def of(cls, status: dict[str, str], securebits: int) -> Self:
        """What a /proc/PID/status shows, which is all but the securebits."""
        return cls(
            users=Ids(*map(int, status["Uid"].split())),
            group_ids=Ids(*map(int, status["Gid"].split())),
            groups=tuple(map(int, status["Groups"].split())),
            capabilities=Capabilities.of(status),
            securebits=securebits,
            no_new_privs=status["NoNewPrivs"] == "1",
        )

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        born = Credentials.of(task.born(), _own_securebits() & ~Securebit.KEEP_CAPS)  # exec clears KEEP_CAPS
        if born == self and task.users is None:  # in there its securebits are others for the time being
            return
        here = born.capabilities
        caps = self.capabilities & here
        lost = (self.capabilities.permitted & ~caps.permitted) | (self.capabilities.bounding & ~caps.bounding)
        if lost and task.leader:
            task.warn(f"{task} cannot have, on this host: {names(lost)}")
        if born.no_new_privs and not self.no_new_privs and task.leader:
            task.warn(f"{task} will have no_new_privs, since tcpmig has it and nobody can be rid of it")

        keep = Securebit.KEEP_CAPS | Securebit.NO_SETUID_FIXUP
        calls.call(SYS.prctl, Pr.SET_SECUREBITS, keep, label="keep capabilities over the change of IDs")
        self._set_ids(task, born)

        header = calls.put(capset_header())
        data = capset_data(effective=here.permitted, permitted=here.permitted, inheritable=caps.inheritable)
        calls.call(SYS.capset, header, calls.put(data), label="set the inheritable capabilities")
        calls.call(SYS.prctl, Pr.CAP_AMBIENT, CapAmbient.CLEAR_ALL, label="clear the ambient capabilities")
        for bit in _bits(caps.ambient):
            calls.call(SYS.prctl, Pr.CAP_AMBIENT, CapAmbient.RAISE, bit, label=f"raise the ambient capability {bit}")
        for bit in _bits(here.bounding & ~caps.bounding):
            calls.call(SYS.prctl, Pr.CAPBSET_DROP, bit, label=f"drop the bounding capability {bit}")
        calls.call(SYS.prctl, Pr.SET_SECUREBITS, self.securebits, label="set the securebits")
        data = capset_data(effective=caps.effective, permitted=caps.permitted, inheritable=caps.inheritable)
        calls.call(SYS.capset, header, calls.put(data), label="set the capabilities")
        if self.no_new_privs:
            calls.call(SYS.prctl, Pr.SET_NO_NEW_PRIVS, 1, label="set no_new_privs")

    def _set_ids(self, task: TaskBuilder, born: Credentials) -> None:
        calls, inside = task.calls, _Inside(task)
        users, groups = inside.users(self.users), inside.groups(self.group_ids)
        if task.users is None or sorted(self.groups) != sorted(born.groups):  # inside they may be nobody's to choose
            every = [inside.group(one) for one in self.groups]
            array = calls.put(struct.pack(f"<{len(every)}I", *every))
            calls.call(SYS.setgroups, len(every), array, label="set the supplementary groups")
        calls.call(SYS.setresgid, groups.real, groups.effective, groups.saved, label="set the group IDs")
        calls.call(SYS.setresuid, users.real, users.effective, users.saved, label="set the user IDs")
        # These two return the previous ID, and nothing tells of a failure; the IDs above follow the effective ones.
        if groups.fs != groups.effective:
            calls.call(SYS.setfsgid, groups.fs, ignore=True, label="set the group ID for files")
        if users.fs != users.effective:
            calls.call(SYS.setfsuid, users.fs, ignore=True, label="set the user ID for files")


class _Inside:
    """IDs as they are in the user namespace of a task."""

    def __init__(self, task: TaskBuilder) -> None:
        self._task = task

    def user(self, outside: int) -> int:
        """StateRefused if it has none."""
        space = self._task.users
        return self._known(outside if space is None else space.user(outside), outside)

    def group(self, outside: int) -> int:
        """StateRefused if it has none."""
        space = self._task.users
        return self._known(outside if space is None else space.group(outside), outside)

    def _known(self, inside: int | None, outside: int) -> int:
        if inside is None:
            raise StateRefused(f"the ID {outside} is not in the map of its user namespace", object=str(self._task))
        return inside

    def users(self, ids: Ids) -> Ids:
        """All four."""
        return Ids(self.user(ids.real), self.user(ids.effective), self.user(ids.saved), self.user(ids.fs))

    def groups(self, ids: Ids) -> Ids:
        """All four."""
        return Ids(self.group(ids.real), self.group(ids.effective), self.group(ids.saved), self.group(ids.fs))


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(CAPABILITY_BITS) if mask >> bit & 1]


@functools.cache
def _own_securebits() -> int:
    """Those of the tool, which the processes that it starts inherit."""
    return syscall(SYS.prctl, Pr.GET_SECUREBITS)
