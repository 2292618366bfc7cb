"""What Linux does with areas of memory and registers that it shares with a thread."""

from __future__ import annotations

import ctypes
import errno
import threading

import pytest
from kernel_child import child, in_child, stopped

from checkpoint.arch.x86_64.xstate import XSTATE_SET
from checkpoint.kernel import ptrace
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

RSEQ_SIGNATURE = 0x53053053


def _register(address: int) -> int:
    """errno of registering an rseq area, in a new thread (glibc has registered one for it)."""
    found: list[int] = []

    def work() -> None:
        config = ptrace_free_config()
        syscall(SYS.rseq, config[0], config[1], 1, RSEQ_SIGNATURE)  # RSEQ_FLAG_UNREGISTER
        try:
            syscall(SYS.rseq, address, 32, 0, RSEQ_SIGNATURE)
        except OSError as error:
            found.append(error.errno or -1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0] if found else 0


def ptrace_free_config() -> tuple[int, int]:
    """(address, size) of this thread's rseq area: glibc tells its offset from the thread pointer."""
    libc = ctypes.CDLL(None)
    offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
    size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
    pointer = ctypes.c_ulong()
    syscall(SYS.arch_prctl, 0x1003, ctypes.addressof(pointer))  # ARCH_GET_FS
    return pointer.value + offset, max(size, 32)


def test_an_rseq_area_must_be_mapped_when_it_is_registered():
    assert in_child(lambda: 0 if _register(0x1000) == errno.EFAULT else 1) == 0


def test_a_shorter_or_longer_xsave_area_is_refused():
    with child(lambda: None) as pid, stopped(pid):
        area = ptrace.get_register_set(pid, XSTATE_SET)
        ptrace.set_register_set(pid, XSTATE_SET, area)
        with pytest.raises(OSError, match=r"Bad address|Invalid argument"):
            ptrace.set_register_set(pid, XSTATE_SET, area[:-8])
        ptrace.set_register_set(pid, XSTATE_SET, area + bytes(8))  # only the first bytes count
        assert ptrace.get_register_set(pid, XSTATE_SET) == area
