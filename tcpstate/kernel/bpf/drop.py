"""An eBPF socket filter that drops all: one program for all sockets, quicker to attach than a classic filter."""

from __future__ import annotations

import functools

from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import Asm

__all__ = ["drop_program"]


@functools.cache
def drop_program() -> int | None:
    """Descriptor of an eBPF program that drops every segment, one for all sockets; None if this process may not load
    one (then the classic :data:`~tcpstate.kernel.bpf.DROP_ALL` does the same, slower to attach)."""
    try:
        return call.load(call.ProgramType.SOCKET_FILTER, Asm().exit(0).code(), name="tcpmig_drop")
    except OSError:
        # no CAP_BPF, no bpf(2), or locked down: the caller has the classic filter
        return None
