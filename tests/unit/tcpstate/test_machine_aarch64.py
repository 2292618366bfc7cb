"""Numbers of system calls; the code is assembled, and run, in tests/campaign/test_guest_aarch64.py."""

import re

from tcpstate.kernel.machine import aarch64, x86_64


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
