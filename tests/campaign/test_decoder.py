"""What is told of each instruction of the C library, against objdump: its length, and whether it names a register.

A register that objdump shows and we do not see would be one that a program still wants.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator

import pytest

from checkpoint.arch.x86_64 import liveness

LIBRARY = "/lib/x86_64-linux-gnu/libc.so.6"
NAMES = {2: "rdx|edx|dx|dl|dh", 8: "r8|r8d|r8w|r8b", 10: "r10|r10d|r10w|r10b"}


def instructions() -> Iterator[tuple[int, str, int]]:
    """(address, what objdump shows, address of the next)"""
    command = ["objdump", "-d", "--no-show-raw-insn", "-j", ".text", LIBRARY]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = [match for line in lines if (match := re.match(r"\s*([0-9a-f]+):\t(.*)", line))]
    for one, following in itertools.pairwise(found):
        if not re.search(r"\(bad\)|^\.byte", one[2]):
            yield int(one[1], 16), one[2].partition("#")[0].partition("<")[0], int(following[1], 16)


@pytest.mark.parametrize("register", NAMES)
def test_every_instruction_of_the_c_library(register: int) -> None:
    with open(LIBRARY, "rb") as file:
        code = file.read()  # .text lies where its addresses say
    named = re.compile(rf"%({NAMES[register]})\b")
    known, wrong = 0, []
    for at, text, following in instructions():
        try:
            step = liveness._Decoder(code[at : at + 15], at, register).step()
        except liveness._UnknownError:
            continue
        known += 1
        goes_on = following in step.following or step.uses or not step.following or text.startswith("jmp")
        if (
            not goes_on
            or bool(named.search(text)) > (step.uses or step.spoils)
            or step.spoils > bool(named.search(text))
        ):
            wrong.append(f"{at:x}: {text}: {step}")
    assert known > 100_000
    assert wrong == []
