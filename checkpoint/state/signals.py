"""How a process handles signals, and on which stack a thread does it.

Source: Linux kernel/signal.c, do_sigaction, do_sigaltstack.
"""

from __future__ import annotations

import signal
from typing import Final, Self

from checkpoint.kernel.signals import (
    NSIG,
    SIGACTION_SIZE,
    SIGSET_SIZE,
    STACK_SIZE,
    Sigaction,
    SsFlag,
    StackT,
)
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["AlternateStack", "Handler", "SignalHandlers"]

#: what can have a handler: all but the two that nobody can catch
_CATCHABLE: Final = tuple(n for n in range(1, NSIG + 1) if n not in (signal.SIGKILL, signal.SIGSTOP))
_DEFAULT: Final = Sigaction(0, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """What happens on one signal: struct sigaction as the kernel holds it.

    handler   address of the function; 0 the default, 1 nothing
    flags     SA_*
    restorer  address that returns from it
    mask      signals blocked meanwhile, bit n-1 for signal n
    """

    signal: int
    handler: int
    flags: int
    restorer: int
    mask: int

    def __post_init__(self) -> None:
        if self.signal not in _CATCHABLE:
            raise ValueError(f"signal {self.signal} cannot have a handler")
        for name in ("handler", "flags", "restorer", "mask"):
            unsigned(name, getattr(self, name))

    @property
    def action(self) -> Sigaction:
        """The structure that rt_sigaction takes."""
        return Sigaction(self.handler, self.flags, self.restorer, self.mask)


@register("signal handlers")
@dataclass(frozen=True, slots=True, kw_only=True)
class SignalHandlers(State):
    """The signals that are not handled in the default way."""

    handlers: tuple[Handler, ...]

    def __post_init__(self) -> None:
        if len({h.signal for h in self.handlers}) != len(self.handlers):
            raise ValueError("two handlers for one signal")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(SIGACTION_SIZE * len(_CATCHABLE))
        call = task.calls.call
        for i, number in enumerate(_CATCHABLE):
            call(SYS.rt_sigaction, number, 0, room + SIGACTION_SIZE * i, SIGSET_SIZE, label="read a signal handler")
        yield
        found = []
        actions, default = room.bytes(), _DEFAULT.pack()
        for i, number in enumerate(_CATCHABLE):
            data = actions[SIGACTION_SIZE * i : SIGACTION_SIZE * (i + 1)]
            if data != default:
                a = Sigaction.unpack(data)
                found.append(Handler(signal=number, handler=a.handler, flags=a.flags, restorer=a.restorer, mask=a.mask))
        return cls(handlers=tuple(found))

    def rebuild(self, task: TaskBuilder) -> None:
        # All of them, also the default ones: a new process has inherited what the tool ignores (Python: SIGPIPE).
        wanted = {h.signal: task.calls.put(h.action.pack()) for h in self.handlers}
        default = task.calls.put(_DEFAULT.pack())
        for number in _CATCHABLE:
            action = wanted.get(number, default)
            task.calls.call(SYS.rt_sigaction, number, action, 0, SIGSET_SIZE, label=f"set the handler of {number}")


@register("alternate signal stack")
@dataclass(frozen=True, slots=True, kw_only=True)
class AlternateStack(State):
    """Where handlers with SA_ONSTACK run; ``enabled`` False: nowhere special.

    flags  SS_AUTODISARM or 0; whether the thread stands on it now follows from its stack pointer
    """

    enabled: bool
    base: int
    size: int
    flags: int

    def __post_init__(self) -> None:
        unsigned("base", self.base)
        unsigned("size", self.size)
        bounded("flags", self.flags & ~SsFlag.AUTODISARM, 0, 0)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(STACK_SIZE)
        task.calls.call(SYS.sigaltstack, 0, room, label="read the alternate signal stack")
        yield
        stack = StackT.unpack(room.bytes())
        enabled = not stack.flags & SsFlag.DISABLE
        return cls(
            enabled=enabled,
            base=stack.base if enabled else 0,
            size=stack.size if enabled else 0,
            flags=int(stack.flags & SsFlag.AUTODISARM) if enabled else 0,
        )

    def rebuild(self, task: TaskBuilder) -> None:
        stack = StackT(self.base, self.flags if self.enabled else SsFlag.DISABLE, self.size)
        task.calls.call(SYS.sigaltstack, task.calls.put(stack.pack()), 0, label="set the alternate signal stack")
