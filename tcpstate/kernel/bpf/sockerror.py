"""The error that is pending on a socket, without taking it away.

SO_ERROR and every failing call clear it.  A BPF iterator over open files sees the sock itself: it writes cookie and
error of every socket that has one.  It walks the descriptors of all processes, milliseconds, so it is asked only where
poll() says that there is an error.

Source: kernel/bpf/task_iter.c (bpf_iter_task_file), include/net/sock.h (sk_err).  Kernel 5.11 (bpf_sock_from_file).
"""

from __future__ import annotations

import functools
import os
import struct
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Kind
from tcpstate.kernel.bpf.layout import Layout, layout

__all__ = ["pending_errors"]

_RECORD: Final = struct.Struct("=QII")  # cookie, error, padding
#: members of struct bpf_iter__task_file, the program's context: pointers and a number, laid out by the macro of
#: include/linux/bpf.h (eight bytes each)
_META, _FILE = 0, 24


def _program(known: Layout) -> bytes:
    start = -_RECORD.size
    asm = Asm().load(8, 6, 1, _META).load(8, 1, 1, _FILE).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.call(Helper.SOCK_FROM_FILE).jump_if(Jump.EQUAL, 0, 0, "out")
    asm.load(8, 7, 0, known.offset("socket", "sk")).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(4, 8, 7, known.offset("sock", "sk_err")).jump_if(Jump.EQUAL, 8, 0, "out")
    asm.load(8, 1, 7, known.offset("sock_common", "skc_cookie")).store(8, FRAME, start, 1)
    asm.store(4, FRAME, start + 8, 8).store_number(4, FRAME, start + 12, 0)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, start).set(3, _RECORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _link() -> int:
    known = layout()
    try:
        target = known.id(Kind.FUNCTION, "bpf_iter_task_file")
        program = call.load(
            call.ProgramType.TRACING,
            _program(known),
            attach=call.Attach.TRACE_ITER,
            target=target,
            name="tcpmig_sk_err",
            gpl=True,
        )
        try:
            made = call.link(program, 0, call.Attach.TRACE_ITER)
        finally:
            os.close(program)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(
            f"no BPF iterator over open files: {error}",
            object="bpf_iter_task_file",
            fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF.",
        ) from None
    known.save()
    known.forget_btf()
    return made


def pending_errors() -> dict[int, int]:
    """errno by SO_COOKIE, of all open sockets that have an error pending; a socket has no cookie until it was asked for
    it. KernelFeatureMissing, OSError."""
    return {cookie: error for cookie, error, _ in _RECORD.iter_unpack(call.iterate(_link())) if cookie}
