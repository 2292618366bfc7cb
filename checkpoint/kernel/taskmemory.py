"""Programs that run once for a process, and work in memory of ours: what is asked lies in a map, and what came of it.

An iterator hands its program one thing at a time; such a program is handed the process alone, and goes through what
belongs to it by itself.  Nothing is locked: whoever can change that must stand still.  What is read of something that
changes meanwhile is anything at all, and harms nobody.

Source: kernel/bpf/task_iter.c; may_goto: kernel/bpf/verifier.c, Linux 6.9.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Self

from checkpoint.kernel import taskiter
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout

__all__ = ["WORD", "TaskMemory", "read_word"]

_PAGE: Final = 4096
#: the frame: a word that was read
WORD: Final = -8


def read_word(asm: Asm, base: int, offset: int) -> None:
    """Register 1 = the word at the address in ``base`` plus ``offset``. 2 and 3 are used, and the frame at WORD."""
    asm.mov(3, base).add(3, offset).frame(1, WORD).set(2, 8).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, FRAME, WORD)


class TaskMemory:
    """The memory, and the program that works in it. KernelFeatureMissing. Close it.

    size   bytes of the memory
    build  makes the program: what is known of the kernel, descriptor of the map
    name   of both
    what   cannot be read if it fails, in words; of which ``object``; the kernel ``since`` which it can
    """

    def __init__(
        self, size: int, build: Callable[[Layout, int], bytes], *, name: str, what: str, object: str, since: str
    ) -> None:
        known = layout()
        size = -(-size // _PAGE) * _PAGE
        fds: list[int] = []
        try:
            fds.append(call.create_map(call.MapType.ARRAY, 4, size, 1, flags=call.MapFlag.MMAPABLE, name=name))
            self.memory = call.map_memory(fds[0], size)
            self._program = taskiter.load(known, build(known, fds[0]), name)
        except (OSError, BadBtf) as error:
            raise KernelFeatureMissing(
                f"{what} cannot be read by BPF: {error}",
                object=object,
                fix=f"Run as root (CAP_BPF, CAP_PERFMON) on a kernel from {since} on with CONFIG_DEBUG_INFO_BTF.",
            ) from None
        finally:
            for fd in fds:
                os.close(fd)
        known.save()

    def run(self, asked: bytes, pid: int) -> None:
        """Put ``asked`` at the beginning of the memory, and run the program for a process. OSError."""
        self.memory[: len(asked)] = asked
        taskiter.read(self._program, pid)

    def close(self) -> None:
        """Give the program and the memory up."""
        self.memory.close()
        os.close(self._program)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
