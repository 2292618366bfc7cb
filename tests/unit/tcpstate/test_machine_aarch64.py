"""The machine code in the source is what its assembly text says; it runs in tests/campaign/test_guest_aarch64.py."""

import re
import subprocess

from tcpstate.kernel.machine import aarch64, x86_64


def assemble(source, tmp_path):
    text, obj, flat = tmp_path / "r.s", tmp_path / "r.o", tmp_path / "r.bin"
    text.write_text(source)
    subprocess.run(["llvm-mc", "-triple=aarch64-linux-gnu", "-filetype=obj", "-o", obj, text], check=True)
    subprocess.run(["llvm-objcopy", "-O", "binary", "-j", ".text", obj, flat], check=True)
    return flat.read_bytes()


def test_routine_is_its_source_assembled(tmp_path):
    assert assemble(aarch64.SOURCE, tmp_path) == aarch64.ROUTINE


def test_walk_source_stands_alone_and_moves_freely(tmp_path):
    plain = assemble("        .text\n" + aarch64.WALK_SOURCE, tmp_path)
    assert plain in aarch64.ROUTINE, "the loop is position-independent: the same bytes wherever it stands"


def test_walk_source_uses_no_stack_and_keeps_what_it_says():
    words = set(re.findall(r"[a-z]+\d*", aarch64.WALK_SOURCE))
    kept = {f"x{number}" for number in range(22, 31)}
    assert not {"sp", "ret", "blr", "bl"} & words
    assert not kept & words


def test_numbers_agree_with_the_kernel_headers():
    numbers = {}
    with open("/usr/include/asm-generic/unistd.h") as header:
        for line in header:
            found = re.match(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", line)
            if found:
                numbers[found[1]] = int(found[2])
    known = {s.name: s.value for s in aarch64.SYS if s.name in numbers}
    assert len(known) > 230
    assert known == {name: numbers[name] for name in known}


def test_what_it_lacks_has_younger_names():
    lacking = {s.name for s in x86_64.SYS} - {s.name for s in aarch64.SYS}
    assert lacking <= {
        *("open", "stat", "lstat", "poll", "access", "pipe", "select", "dup2", "pause", "alarm", "fork", "vfork"),
        *("rename", "mkdir", "rmdir", "link", "unlink", "symlink", "readlink", "chmod", "chown", "getpgrp", "time"),
        *("arch_prctl", "set_thread_area", "get_thread_area", "map_shadow_stack"),
        *("epoll_create", "epoll_wait", "inotify_init", "signalfd", "eventfd"),
    }
