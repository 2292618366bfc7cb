"""Whether any TCP socket of a network namespace signs its segments: a pass of the TCP iterator that writes of no other.

Source: include/linux/tcp.h, struct tcp_sock.md5sig_info.  Kernel 5.9 (BPF iterator over TCP sockets).
"""

from __future__ import annotations

import functools

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.tcpsock import iterator_program

__all__ = ["nobody_signs"]


def _program(known: Layout) -> bytes:
    asm = Asm().load(8, 6, 1, 0).load(8, 7, 1, 8).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out")
    asm.load(8, 1, 0, known.offset("tcp_sock", "md5sig_info")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.store_number(8, FRAME, -8, 1).load(8, 1, 6, known.offset("bpf_iter_meta", "seq"))
    return asm.frame(2, -8).set(3, 8).call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _link() -> int:
    """The attached program; -1: this kernel lends us none."""
    known = layout()
    try:
        link = iterator_program(_program(known), known)
    except (OSError, BadBtf, KernelFeatureMissing):
        return -1
    known.save()
    return link


def nobody_signs() -> bool:
    """Whether it is certain that no socket of the calling thread's network namespace has a key, listening or not."""
    if _link() < 0:
        return False
    return not call.iterate(_link())
