"""prctl(2): the options that read and set state of a process or thread.

Source: include/uapi/linux/prctl.h, include/uapi/linux/securebits.h.  Where an option is younger than Linux 5.10 the
first kernel is named; an older one answers EINVAL.
"""

from __future__ import annotations

import enum

__all__ = ["CapAmbient", "MceKill", "MdweFlag", "Pr", "Securebit", "Speculation", "SpeculationState", "TimerIds"]


class Pr(enum.IntEnum):
    """Options, by the header's names without the prefix."""

    SET_PDEATHSIG = 1
    GET_PDEATHSIG = 2
    GET_DUMPABLE = 3
    SET_DUMPABLE = 4
    SET_KEEPCAPS = 8
    SET_NAME = 15
    GET_NAME = 16
    SET_SECCOMP = 22
    CAPBSET_DROP = 24
    GET_TSC = 25
    SET_TSC = 26
    GET_SECUREBITS = 27
    SET_SECUREBITS = 28
    SET_TIMERSLACK = 29
    GET_TIMERSLACK = 30
    MCE_KILL = 33
    MCE_KILL_GET = 34
    SET_CHILD_SUBREAPER = 36
    GET_CHILD_SUBREAPER = 37
    SET_NO_NEW_PRIVS = 38
    GET_NO_NEW_PRIVS = 39
    GET_TID_ADDRESS = 40
    SET_THP_DISABLE = 41
    GET_THP_DISABLE = 42
    CAP_AMBIENT = 47
    GET_SPECULATION_CTRL = 52
    SET_SPECULATION_CTRL = 53
    SET_MDWE = 65  # 6.3
    GET_MDWE = 66  # 6.3
    SET_MEMORY_MERGE = 67  # 6.4
    GET_MEMORY_MERGE = 68  # 6.4
    TIMER_CREATE_RESTORE_IDS = 77  # 6.16


class CapAmbient(enum.IntEnum):
    """Second argument of CAP_AMBIENT."""

    RAISE = 2
    CLEAR_ALL = 4


class Securebit(enum.IntFlag):
    """Bits of GET_SECUREBITS (include/uapi/linux/securebits.h); every bit n has a lock at n + 1."""

    NOROOT = 1 << 0
    NOROOT_LOCKED = 1 << 1
    NO_SETUID_FIXUP = 1 << 2
    NO_SETUID_FIXUP_LOCKED = 1 << 3
    KEEP_CAPS = 1 << 4
    KEEP_CAPS_LOCKED = 1 << 5
    NO_CAP_AMBIENT_RAISE = 1 << 6
    NO_CAP_AMBIENT_RAISE_LOCKED = 1 << 7


class TimerIds(enum.IntEnum):
    """Second argument of TIMER_CREATE_RESTORE_IDS."""

    OFF = 0
    ON = 1
    GET = 2


class Speculation(enum.IntEnum):
    """Second argument of GET_/SET_SPECULATION_CTRL: which speculation."""

    STORE_BYPASS = 0
    INDIRECT_BRANCH = 1
    L1D_FLUSH = 2


class SpeculationState(enum.IntFlag):
    """What GET_SPECULATION_CTRL answers; one of the bits above PRCTL is what SET_SPECULATION_CTRL takes."""

    NOT_AFFECTED = 0
    PRCTL = 1 << 0
    ENABLE = 1 << 1
    DISABLE = 1 << 2
    FORCE_DISABLE = 1 << 3
    DISABLE_NOEXEC = 1 << 4


class MceKill(enum.IntEnum):
    """Arguments of MCE_KILL: clear or set, and the policies."""

    CLEAR = 0
    SET = 1
    LATE = 0
    EARLY = 1
    DEFAULT = 2


class MdweFlag(enum.IntFlag):
    """Bits of GET_MDWE."""

    REFUSE_EXEC_GAIN = 1 << 0
    NO_INHERIT = 1 << 1
