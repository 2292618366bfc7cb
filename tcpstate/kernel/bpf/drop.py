"""eBPF socket filters that drop all, or all but what carries a mark: one program for all sockets, quicker to attach
than a classic filter."""

from __future__ import annotations

import functools

from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import Asm, Jump

__all__ = ["drop_program", "mark_program"]

_SKB_MARK = 8  # of struct __sk_buff, the kernel's ABI (linux/bpf.h)
_ALL = 0x7FFFFFFF  # larger than any packet


@functools.cache
def drop_program() -> int | None:
    """Descriptor of an eBPF program that drops every segment, one for all sockets; None if this process may not load
    one (then the classic :data:`~tcpstate.kernel.bpf.DROP_ALL` does the same, slower to attach)."""
    try:
        return call.load(call.ProgramType.SOCKET_FILTER, Asm().exit(0).code(), name="tcpmig_drop")
    except OSError:
        # no CAP_BPF, no bpf(2), or locked down: the caller has the classic filter
        return None


@functools.cache
def mark_program(mark: int) -> int | None:
    """Descriptor of an eBPF program that drops every segment but those that carry ``mark``; None as above."""
    code = Asm().load(4, 2, 1, _SKB_MARK).set(0, 0).jump_if(Jump.NOT_EQUAL_32, 2, mark, "out").set(0, _ALL)
    try:
        return call.load(call.ProgramType.SOCKET_FILTER, code.label("out").exit().code(), name="tcpmig_mark")
    except OSError:
        # no CAP_BPF, no bpf(2), or locked down: the caller has a classic filter
        return None
