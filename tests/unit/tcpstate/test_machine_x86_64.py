"""The machine code in the source is what its assembly text says."""

import subprocess

from tcpstate.kernel.machine import x86_64


def assemble(source, tmp_path):
    text, obj, flat = tmp_path / "r.s", tmp_path / "r.o", tmp_path / "r.bin"
    text.write_text(source)
    subprocess.run(["as", "--64", "-o", obj, text], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
    return flat.read_bytes()


def test_routine_is_its_source_assembled(tmp_path):
    assert assemble(x86_64.SOURCE, tmp_path) == x86_64.ROUTINE


def test_walk_source_stands_alone_and_moves_freely(tmp_path):
    head = "        .intel_syntax noprefix\n        .text\n"
    plain = assemble(head + x86_64.WALK_SOURCE, tmp_path)
    assert plain in x86_64.ROUTINE, "the loop is position-independent: the same bytes wherever it stands"


def test_walk_source_uses_no_stack():
    words = x86_64.WALK_SOURCE.split()
    assert not {"push", "pop", "call", "ret", "rsp", "rbp", "rbx", "r14", "r15"} & set(words)


def test_numbers_agree_with_the_kernel_headers():
    numbers = {}
    with open("/usr/include/x86_64-linux-gnu/asm/unistd_64.h") as header:
        for line in header:
            words = line.split()
            if len(words) == 3 and words[1].startswith("__NR_"):
                numbers[words[1].removeprefix("__NR_")] = int(words[2])
    known = {s.name: s.value for s in x86_64.SYS if s.name in numbers}
    assert len(known) > 250
    assert known == {name: numbers[name] for name in known}
