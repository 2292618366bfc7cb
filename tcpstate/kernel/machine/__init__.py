"""What depends on the machine's architecture: one file per machine, one interface.

``SYS``          IntEnum of system call numbers, by the kernel's names
``O_LARGEFILE``  that flag of open(2)
``EPOLL_EVENT``  layout of struct epoll_event, for ``struct``
``WALK_SOURCE``  assembly text of the loop that walks a table of system calls
``SOURCE``       assembly text of the routine for our own process: ``entry *routine(entry *first, entry *end)``
``ROUTINE``      the same, assembled

Nothing else in this package asks which machine this is.
"""

from __future__ import annotations

import os

from tcpstate.errors import KernelFeatureMissing

_MACHINE = os.uname().machine

if _MACHINE == "x86_64":
    from tcpstate.kernel.machine.x86_64 import EPOLL_EVENT, O_LARGEFILE, ROUTINE, SOURCE, SYS, WALK_SOURCE
elif _MACHINE == "aarch64":
    # another enumeration; what is used outside of the machines' own files are names that both have
    from tcpstate.kernel.machine.aarch64 import (  # type: ignore[assignment]
        EPOLL_EVENT,
        O_LARGEFILE,
        ROUTINE,
        SOURCE,
        SYS,
        WALK_SOURCE,
    )
else:
    raise KernelFeatureMissing(
        f"there is no description of the machine {_MACHINE}",
        object=_MACHINE,
        fix="Run tcpmig on x86-64 or aarch64; other machines need a file in tcpstate/kernel/machine/.",
    )

__all__ = ["EPOLL_EVENT", "O_LARGEFILE", "ROUTINE", "SOURCE", "SYS", "WALK_SOURCE"]
