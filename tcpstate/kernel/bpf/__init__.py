"""BPF: classic socket filters, and a small loader of our own for eBPF.

``classic``   socket filters as tuples; what every socket takes
``asm``       an assembler for the instructions that we use
``call``      bpf(2): maps, programs, links, iterators
``btf``       the kernel's own description of its structures
``layout``    numbers out of it (offsets, sizes, ids) by name, remembered from run to run
``tcpsock``   one pass over all TCP sockets: what the kernel keeps of each
``windows``   congestion windows written, by a congestion control of ours
``drop``      a socket filter that drops all

No structure of the kernel has an offset in our code: each is asked for by name.  The programs are our own; the kernel
lends some of what they use only to programs that are offered under the GPL as well, so these few instructions are
(``call.load(.., gpl=True)``).
"""

from __future__ import annotations

from tcpstate.kernel.bpf.classic import (
    ACCEPT_ALL,
    DROP_ALL,
    INSTRUCTION_SIZE,
    MAX_INSTRUCTIONS,
    Ancillary,
    Instruction,
    Op,
    attach,
    drop_but,
    pack,
    program,
    unpack,
)
from tcpstate.kernel.bpf.drop import drop_program, mark_program

__all__ = [
    "ACCEPT_ALL",
    "DROP_ALL",
    "INSTRUCTION_SIZE",
    "MAX_INSTRUCTIONS",
    "Ancillary",
    "Instruction",
    "Op",
    "attach",
    "drop_but",
    "drop_program",
    "mark_program",
    "pack",
    "program",
    "unpack",
]
