"""Connections that have an urgent byte of their own under way: no system call tells where it stands.

A pass of the TCP iterator that writes nothing of all the others; it is cheap however many there are.

Source: include/net/tcp.h tcp_urg_mode (snd_up is not snd_una).  Kernel 5.9 (BPF iterator over TCP sockets).
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.tcpsock import HEAD, conn_id_of, head, iterator_program
from tcpstate.kernel.tcp import TcpState

__all__ = ["urgent_bytes"]

_NUMBER: Final = struct.Struct("=I4x")
_SIZE: Final = HEAD.size + _NUMBER.size


def _program(known: Layout) -> bytes:
    tcp = functools.partial(known.offset, "tcp_sock")
    asm = Asm().mov(9, 1).load(8, 6, 9, 0).load(8, 7, 9, 8).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(1, 1, 7, known.offset("sock_common", "skc_state")).jump_if(Jump.EQUAL, 1, TcpState.LISTEN, "out")
    asm.mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out").mov(8, 0)
    asm.load(4, 1, 8, tcp("snd_up")).load(4, 2, 8, tcp("snd_una")).jump_if_register(Jump.EQUAL, 1, 2, "out")
    head(asm, known, 7, -_SIZE)
    at = HEAD.size - _SIZE
    # the padding: the verifier wants every byte that is written out to have been set
    asm.load(4, 1, 8, tcp("snd_up")).store(4, FRAME, at, 1).store_number(4, FRAME, at + 4, 0)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -_SIZE).set(3, _SIZE).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code()


@functools.cache
def _link() -> int:
    known = layout()
    try:
        link = iterator_program(_program(known), known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(
            f"no BPF iterator over TCP sockets: {error}",
            object="bpf_iter_tcp",
            fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF.",
        ) from None
    known.save()
    return link


def urgent_bytes() -> dict[ConnId, int]:
    """The sequence number after the urgent byte of each connection that has one under way, in the calling thread's
    network namespace. KernelFeatureMissing, OSError."""
    data = call.iterate(_link())
    return {
        conn_id_of(data[at : at + HEAD.size]): _NUMBER.unpack_from(data, at + HEAD.size)[0]
        for at in range(0, len(data), _SIZE)
    }
