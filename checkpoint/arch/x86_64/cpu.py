"""CPU features that programs choose their code by, as /proc/cpuinfo names them, x86-64."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["chosen_by"]

#: how the names of the CPU features begin that a program may have found and chosen its code by (ifuncs, JITs); the
#: others are the kernel's business
_VISIBLE: Final = re.compile(
    r"""
    3dnow | abm | adx | aes | amx | apx | avx | bmi | cldemote | clflush | clwb | clzero | cmpxchg | cx16 | cx8 |
    enqcmd | erms | f16c | fma | fsgsbase | fsrm | fxsr | fzrm | gfni | hle | lahf | lzcnt | misalignsse | mmx |
    monitorx | movbe | movdir | mwaitx | pclmul | popcnt | prefetch | pku | ptwrite | rdpid | rdpru | rdrand |
    rdseed | rdtscp | rtm | serialize | sha | sm3 | sm4 | sse | ssse | tbm | tsxldtrk | uintr | user_shstk | vaes
    | vpclmul | waitpkg | wbnoinvd | xop | xsave | xgetbv
    """,
    re.VERBOSE,
)


def chosen_by(flags: Iterable[str]) -> frozenset[str]:
    """Those of the features of a CPU that a program may have found."""
    return frozenset(filter(_VISIBLE.match, flags))
