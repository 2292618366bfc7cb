"""The session keyring of a process.

Keys do not move: they are secrets of a user on a host, and most may not be read.  But a rebuilt process may not have
the tool's keyring either, which may be that of an administrator's login and is passed on to every child.  So each gets
one of the name that its own had, new and empty unless one of that name is there for it; or a new one without a name,
which is what the kernel gives to whoever asks for the first time.

Source: keyctl(2); security/keys/process_keys.c (join_session_keyring); include/uapi/linux/keyctl.h.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["SessionKeyring"]

_SESSION: Final = (1 << 64) - 3  # KEY_SPEC_SESSION_KEYRING
_JOIN_SESSION_KEYRING, _DESCRIBE, _READ = 1, 6, 11
#: the kernel's names: of a keyring that was given none, and of a user's
_UNNAMED: Final = b"_ses"
_OF_USER: Final = b"_uid"
_LONGEST: Final = 4096
_KEY_SIZE: Final = 4


@register("session keyring")
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionKeyring(State):
    """``name``: that it was given, empty: none; ``keys``: how many are in it, which stay behind."""

    name: bytes = b""
    keys: int = 0

    def __post_init__(self) -> None:
        if b"\0" in self.name or len(self.name) >= _LONGEST or not 0 <= self.keys < 1 << 32:
            raise ValueError("name or keys of a keyring out of range")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        calls = task.calls
        text = calls.room(_LONGEST)
        described = calls.call(SYS.keyctl, _DESCRIBE, _SESSION, text, _LONGEST, ignore=True)
        held = calls.call(SYS.keyctl, _READ, _SESSION, 0, 0, ignore=True)
        yield
        if not described.ok or described.value > _LONGEST:
            return cls()  # it has none, may not look at it, or the kernel has no keys
        # type;uid;gid;permissions;name
        name = text.bytes(described.value).rstrip(b"\0").split(b";", 4)[-1]
        if name.startswith(_OF_USER):
            return cls()  # who has none sees that of the user
        return cls(name=b"" if name == _UNNAMED else name, keys=held.value // _KEY_SIZE if held.ok else 0)

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        name = calls.put(self.name + b"\0") if self.name else 0
        # a kernel without keys has nothing that could be passed on
        calls.call(SYS.keyctl, _JOIN_SESSION_KEYRING, name, ignore=True, label="join a session keyring")
        if self.keys:
            task.warn(f"{task} has a session keyring with {self.keys} keys, which stay behind")
