"""What the kernel will undo of semaphore operations when a process ends (SEM_UNDO), read by a BPF iterator over tasks.

No interface of its own tells it.  The iterator is attached to one thread and writes its ``struct sem_undo`` entries,
one for each set; nothing is changed.

Source: ipc/sem.c (struct sem_undo, sem_undo_list), kernel/bpf/task_iter.c.
"""

from __future__ import annotations

import functools
import logging
import struct
from typing import Final

from checkpoint.kernel import taskiter
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.slotted import dataclass

__all__ = ["LONGEST", "adjustments"]

_log = logging.getLogger(__name__)

#: sets of one process that are told of
_MOST_SETS: Final = 32
#: semaphores of a set that are told of
LONGEST: Final = 96
_POINTER_SIZE: Final = 8


@dataclass(frozen=True, slots=True)
class _Reader:
    """The loaded program, the bytes that it writes for a set, and where in them the set's ID and the numbers lie."""

    program: int
    size: int
    number: int
    numbers: int


def _program(known: Layout, size: int, link: int) -> bytes:
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.frame(1, -8).set(2, 8).mov(3, 7).add(3, known.offset("task_struct", "sysvsem.undo_list"))
    asm.call(Helper.PROBE_READ_KERNEL).load(8, 8, FRAME, -8).jump_if(Jump.EQUAL, 8, 0, "out")
    # the list's head, and what it points to
    asm.add(8, known.offset("sem_undo_list", "list_proc"))
    asm.frame(1, -8).set(2, 8).mov(3, 8).call(Helper.PROBE_READ_KERNEL).load(8, 9, FRAME, -8)
    for _ in range(_MOST_SETS):
        asm.jump_if_register(Jump.EQUAL, 9, 8, "out")
        asm.frame(1, -size).set(2, size).mov(3, 9).add(3, -link).call(Helper.PROBE_READ_KERNEL)
        asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -size).set(3, size).call(Helper.SEQ_WRITE)
        asm.load(8, 9, FRAME, -size + link)
    return asm.label("out").exit(0).code()


@functools.cache
def _reader() -> _Reader | None:
    known = layout()
    try:
        link, number = known.offset("sem_undo", "list_proc"), known.offset("sem_undo", "semid")
        place = known.place("sem_undo", "semadj")
        # a pointer to what lies behind the structure, before it became an array there
        numbers = known.size("sem_undo") if place.size == _POINTER_SIZE else place.offset
        size = numbers + 2 * LONGEST
        size += -size % 8
        program = taskiter.load(known, _program(known, size, link), "tcpmig_undo")
    except (OSError, BadBtf) as error:
        _log.info("what is to be undone of semaphore operations cannot be read: %s", error)
        return None
    known.save()
    return _Reader(program, size, number, numbers)


def adjustments(tid: int) -> list[tuple[int, tuple[int, ...]]]:
    """(ID of the set, what is added to each of its first LONGEST semaphores when the process of this thread ends).

    KernelFeatureMissing where the kernel does not tell, or there are too many sets.
    """
    reader = _reader()
    if reader is None:
        raise KernelFeatureMissing("what is to be undone of semaphore operations cannot be read", object=f"pid {tid}")
    data = taskiter.read(reader.program, tid)
    if len(data) >= _MOST_SETS * reader.size:
        raise KernelFeatureMissing(f"it is to undo operations of {_MOST_SETS} sets or more", object=f"pid {tid}")
    found = []
    for at in range(0, len(data), reader.size):
        (number,) = struct.unpack_from("=i", data, at + reader.number)
        found.append((number, struct.unpack_from(f"={LONGEST}h", data, at + reader.numbers)))
    return found
