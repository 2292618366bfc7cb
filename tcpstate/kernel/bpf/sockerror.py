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

from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Helper, Jump
from tcpstate.kernel.bpf.layout import Layout
from tcpstate.kernel.bpf.opensock import lacking, of_file, over_files

__all__ = ["pending_errors"]

_RECORD: Final = struct.Struct("=QII")  # cookie, error, padding


def _program(known: Layout) -> bytes:
    start = -_RECORD.size
    asm = of_file(known)
    asm.load(4, 8, 7, known.offset("sock", "sk_err")).jump_if(Jump.EQUAL, 8, 0, "out")
    asm.load(8, 1, 7, known.offset("sock_common", "skc_cookie")).store(8, FRAME, start, 1)
    asm.store(4, FRAME, start + 8, 8).store_number(4, FRAME, start + 12, 0)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, start).set(3, _RECORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _link() -> int:
    program = over_files(_program, "tcpmig_sk_err")
    try:
        return call.link(program, 0, call.Attach.TRACE_ITER)
    except OSError as error:
        raise lacking(error) from None
    finally:
        os.close(program)


def pending_errors() -> dict[int, int]:
    """errno by SO_COOKIE, of all open sockets that have an error pending; a socket has no cookie until it was asked for
    it. KernelFeatureMissing, OSError."""
    return {cookie: error for cookie, error, _ in _RECORD.iter_unpack(call.iterate(_link())) if cookie}
