"""Smaller segments for a packet that holds many of them (GSO): what a program does to those too long for a way.

The segments of such a packet are cut where it leaves the host, or never, between two virtual ones.  How long each is
stands beside it, ``gso_size``, and no helper sets that; but one that makes room in front of the payload takes the room
from ``gso_size``, and may take the room away again without giving it back.  Sequence numbers, IDs and checksums follow
where it is cut: tcp_gso_segment, inet_gso_segment.

A packet that is one segment stays as it is: the kernel can cut none that has no ``gso_size``.

Source: net/core/filter.c (bpf_skb_adjust_room, bpf_skb_net_grow, bpf_skb_net_shrink), include/uapi/linux/bpf.h.
Kernel 5.13 (BPF_F_ADJ_ROOM_NO_CSUM_RESET).
"""

from __future__ import annotations

from typing import Final

from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump

__all__ = ["shorten"]

#: struct __sk_buff
_LEN, _GSO_SIZE = 0, 176
_BEHIND_NETWORK_HEADER: Final = 0  # BPF_ADJ_ROOM_NET
#: what is counted in a checksum is as before when the room is away
_FIXED_GSO, _KEEP_CHECKSUM = 1, 1 << 5
#: bytes of room that may be made at once
_MOST: Final = 0xFFF
#: how often: frames of 9000 bytes fit a way of 1280
_TIMES: Final = 2


def shorten(asm: Asm, fits: int, headers: int, done: str, broken: str) -> None:
    """Go on at ``done`` with the packet in register 6, whose segments are no longer than ``fits`` bytes now, IP and TCP
    headers included; or as it was, where the kernel makes no room. At ``broken`` it is no packet any more, for want of
    memory. 7, 8 and 9 are used.

    headers  where in the frame it stands how long the headers are, 4 bytes
    """
    asm.load(4, 1, 6, _GSO_SIZE).jump_if(Jump.EQUAL, 1, 0, done)
    # 7: what is to be taken from it
    asm.load(4, 7, FRAME, headers).add_register(7, 1)
    asm.jump_if(Jump.GREATER, 7, fits, "too long").jump(done)
    asm.label("too long").add(7, -fits)
    for time in range(_TIMES):
        asm.mov(8, 7).jump_if(Jump.GREATER, 7, _MOST, f"most {time}").jump(f"room {time}")
        asm.label(f"most {time}").set(8, _MOST)
        asm.label(f"room {time}").load(4, 9, 6, _LEN)
        asm.mov(1, 6).mov(2, 8).set(3, _BEHIND_NETWORK_HEADER).set(4, _KEEP_CHECKSUM).call(Helper.SKB_ADJUST_ROOM)
        asm.jump_if(Jump.EQUAL, 0, 0, f"made {time}")
        # it may have been refused when the room was there already
        asm.load(4, 1, 6, _LEN).jump_if_register(Jump.EQUAL, 1, 9, done).jump(broken)
        asm.label(f"made {time}")
        asm.mov(1, 6).set(2, 0).subtract_register(2, 8).set(3, _BEHIND_NETWORK_HEADER)
        asm.set(4, _FIXED_GSO | _KEEP_CHECKSUM).call(Helper.SKB_ADJUST_ROOM).jump_if(Jump.NOT_EQUAL, 0, 0, broken)
        asm.subtract_register(7, 8).jump_if(Jump.EQUAL, 7, 0, done)
    asm.jump(done)
