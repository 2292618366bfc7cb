"""The injection of a stub: its memory lies in the stub's window, all of which is unmapped at the end, and its threads
come and go, by calls of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from checkpoint.arch import CALL_AT, beginning, begun, entering
from checkpoint.boot import Boot
from checkpoint.inject import Injection
from checkpoint.kernel import ptrace
from checkpoint.thread import Thread
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["CODE_SIZE", "StubInjection"]

# in the window: the engines, the tables
_CODE_AT: Final = 2 << 20
CODE_SIZE: Final = 16 << 20
_ROOM: Final = 96 << 20
_SPARE: Final = 64
_STOP_TIMEOUT: Final = 5.0


class StubInjection(Injection):
    """See the module's docstring. Open from the stub's birth until it is left."""

    def __init__(self, stub: Stub) -> None:
        super().__init__(stub)
        self._window = stub.window

    def open(self) -> None:
        """Make the stub ready for calls."""
        boot = Boot(self.process, self._excursions)
        boot.write()
        self._boot = boot
        self._map(boot, CODE_SIZE, _ROOM, self._window[0] + _CODE_AT)
        self.add_threads(self.process.threads)

    def inherited(self, stub: Stub) -> StubInjection:
        """That of a child: it has a copy of our memory, in which it stands."""
        copy = StubInjection(stub)
        if self._boot is None:
            raise RuntimeError("the injection is not open")
        copy._boot = Boot(stub, copy._excursions, self._boot.address)
        copy._start, copy._head, copy._end = self._start, self._head, self._end
        copy._arrived(stub.threads)
        return copy

    def _arrived(self, threads: Iterable[Thread]) -> None:
        """Threads were born that stand in our code."""
        threads = list(threads)
        self._excursions.away.update(thread.tid for thread in threads)
        self.add_threads(threads)

    def dismiss(self, threads: Iterable[Thread]) -> None:
        """End threads that stand in our code; they are forgotten here, if they were known."""
        threads = list(threads)
        at = next(iter(self._engines.values())) + CALL_AT
        for thread in threads:
            thread.set_registers(beginning(thread.get_registers(), at, SYS.exit, (0,) * 6))
            thread.cont()
        for thread in threads:
            self.process.await_end(thread)
            self._excursions.forget(thread)
            self._armed.pop(thread.tid, None)
            engine = self._engines.pop(thread.tid, 0)
            if engine:
                self._free.append(engine)

    @property
    def born(self) -> list[int]:
        """tids of those that the calls have made."""
        return self._excursions.born

    def interrupted(self, thread: Thread, number: int, args: tuple[int, ...]) -> int | None:
        """Begin a call that would sleep, and interrupt it at once; what it returned, as the kernel sees it.

        None: a signal came in between, and it was not begun.
        """
        at = self._engines[thread.tid] + CALL_AT
        thread.set_registers(beginning(thread.registers, at, number, args))
        ptrace.cont_to_call(thread.tid)
        thread.wait(_STOP_TIMEOUT)
        if entering(thread.get_registers()) != number:
            return None
        thread.interrupt()  # noted before the call begins to sleep, so it does not
        thread.cont()
        thread.await_interrupt(_STOP_TIMEOUT)
        return begun(thread.get_registers(), at)

    @property
    def spare(self) -> int:
        """The address of _SPARE bytes that no table uses."""
        return self._end - _SPARE

    @property
    def room(self) -> int:
        """Bytes that a table may have."""
        return super().room - CallTable.ALIGN

    def close(self) -> None:
        """Put all threads back and unmap the window."""
        if self._boot is not None:
            self._boot.find_again()
            self._boot.write(self._start, self._end - self._start, self._head)  # a fork has its parent's frame in there
            # The handlers of the rebuilt process may be installed by now.
            self._excursions.caught = True
        super().close()

    def _unmap(self, boot: Boot) -> None:
        start, end = self._window
        boot.call(SYS.munmap, start, end - start, label="unmapping the stub's window")
