"""Congestion windows written: a congestion control of ours whose init() does nothing else.

The kernel has no call that sets a congestion window, but a congestion control may, and BPF can be one (struct_ops).  So
a socket is switched to ours for a moment, and back to its own::

    SO_PRIORITY = i          which slot is its
    TCP_CONGESTION = ours    init() copies slot i into the socket
    TCP_CONGESTION = own     cubic and reno keep both windows, bbr its congestion window
    SO_PRIORITY = own

The slots are an array map that this process sees as memory: filling them is no system call.  The congestion control is
registered as long as this process lives (by a link), under a name of its own.

Source: net/ipv4/bpf_tcp_ca.c (which members may be written), net/ipv4/tcp_cong.c (tcp_reinit_congestion_control).
Kernel 6.4 (struct_ops links).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import queue
import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Kind, minimal
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE

__all__ = ["SLOTS", "WindowSetter", "setter", "slot"]

#: sockets that are served at a time by one thread, and how many threads; powers of two
SLOTS: Final = 1024
_THREADS: Final = 4
_ALL: Final = _THREADS * SLOTS
_SLOT: Final = struct.Struct("=IIQI4x")
_OPS: Final = "tcp_congestion_ops"
_VALUE: Final = "bpf_struct_ops_tcp_congestion_ops"
_SOCK: Final = "inet_conn.icsk_inet.sk."


def slot(cwnd: int, ssthresh: int, pacing_rate: int, ecn: int) -> bytes:
    """What one socket gets; 0 leaves as it is.

    cwnd, ssthresh  segments
    pacing_rate     bytes per second
    ecn             1: explicit congestion notification was negotiated (TCP_ECN_OK)
    """
    return _SLOT.pack(cwnd, ssthresh, pacing_rate, ecn)


class WindowSetter:
    """The registered congestion control and its slots. Refused, BadBtf, OSError."""

    def __init__(self, known: Layout) -> None:
        self.name = f"tcpmig{secrets.token_hex(4)}"
        self._fds: list[int] = []
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for block in range(_THREADS):
            self._free.put(block)
        try:
            slots = self._keep(
                call.create_map(call.MapType.ARRAY, 4, _SLOT.size, _ALL, flags=call.MapFlag.MMAPABLE, name="tcpmig_cc")
            )
            self._memory = call.map_memory(slots, -(-_ALL * _SLOT.size // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._register(known, slots)
        except BaseException:
            for fd in self._fds:
                os.close(fd)
            raise

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _register(self, known: Layout, slots: int) -> None:
        value = bytearray(known.size(_VALUE))
        data = known.offset(_VALUE, "data")
        target = known.id(Kind.STRUCT, _OPS)
        for member, asm in _programs(known, slots).items():
            program = call.load(
                call.ProgramType.STRUCT_OPS, asm.code(), attach=known.index(_OPS, member), target=target, name=member,
                gpl=True,
            )  # fmt: skip
            struct.pack_into("=Q", value, data + known.offset(_OPS, member), self._keep(program))
        name = self.name.encode()
        at = data + known.offset(_OPS, "name")
        value[at : at + len(name)] = name
        btf = call.load_btf(minimal())
        try:
            table = self._keep(
                call.create_map(
                    call.MapType.STRUCT_OPS, 4, len(value), 1, flags=call.MapFlag.LINK, name="tcpmig_ops",
                    btf=btf, structure=known.id(Kind.STRUCT, _VALUE),
                )
            )  # fmt: skip
        finally:
            os.close(btf)
        call.update(table, bytes(4), bytes(value))
        self._keep(call.link(table, 0, call.Attach.STRUCT_OPS))

    @contextlib.contextmanager
    def lent(self, slots: Sequence[bytes]) -> Iterator[range]:
        """In the block the sockets with these priorities get these ``slots``. Waits while other threads have them all.
        ValueError for more than :data:`SLOTS`."""
        if len(slots) > SLOTS:
            raise ValueError(f"{len(slots)} sockets, {SLOTS} slots")
        block = self._free.get()
        try:
            first = block * SLOTS
            data = b"".join(slots)
            self._memory[first * _SLOT.size : first * _SLOT.size + len(data)] = data
            yield range(first, first + len(slots))
        finally:
            self._free.put(block)


def _programs(known: Layout, slots: int) -> dict[str, Asm]:
    """The members that a congestion control must have, and init()."""
    tcp = functools.partial(known.offset, "tcp_sock")
    cwnd, ssthresh = tcp("snd_cwnd"), tcp("snd_ssthresh")
    init = Asm().load(8, 6, 1, 0).load(4, 2, 6, tcp(_SOCK + "sk_priority")).mask(2, _ALL - 1).store(4, FRAME, -4, 2)
    init.map(1, slots).frame(2, -4).call(Helper.MAP_LOOKUP).jump_if(Jump.EQUAL, 0, 0, "out").mov(7, 0)
    for size, at, offset, name in (
        (4, 0, cwnd, "cwnd"),
        (4, 4, ssthresh, "ssthresh"),
        (8, 8, tcp(_SOCK + "sk_pacing_rate"), "pacing"),
    ):
        init.load(size, 1, 7, at).jump_if(Jump.EQUAL, 1, 0, f"no {name}").store(size, 6, offset, 1).label(f"no {name}")
    # just now: else the kernel would take the window for one that was not used for long
    init.call(Helper.JIFFIES64).store(4, 6, tcp("snd_cwnd_stamp"), 0)
    init.load(4, 1, 7, 16).jump_if(Jump.EQUAL, 1, 0, "out")
    init.store(known.place("tcp_sock", "ecn_flags").size, 6, tcp("ecn_flags"), 1).label("out").exit(0)

    def tells(offset: int) -> Asm:
        return Asm().load(8, 6, 1, 0).load(4, 0, 6, offset).exit()

    return {
        "init": init,
        "ssthresh": tells(ssthresh),
        "undo_cwnd": tells(cwnd),
        # Nothing to do at an ACK.  That there is one keeps the kernel from shrinking the window of a connection that
        # was idle, as long as ours is its congestion control.
        "cong_control": Asm().exit(0),
    }


@functools.cache
def setter() -> WindowSetter:
    """One for this process. KernelFeatureMissing, with what is missing."""
    known = layout()
    try:
        made = WindowSetter(known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(
            f"no congestion control by BPF: {error}",
            object="struct_ops",
            fix="Run as root (CAP_BPF, CAP_NET_ADMIN) on a kernel with CONFIG_BPF_JIT and CONFIG_DEBUG_INFO_BTF.",
        ) from None
    finally:
        known.save()
    if len(made.name) >= CONGESTION_NAME_SIZE:
        raise RuntimeError(f"the name {made.name} is too long")
    return made
