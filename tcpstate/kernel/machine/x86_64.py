"""x86-64: system call numbers, and the routine that walks a table of system calls.

The routine is the only machine code of this package.  ``WALK_SOURCE`` is its loop, position-independent and without any
use of the stack, so that the injected, fail-safe engine (``checkpoint/arch``) can include the very same text.
``ROUTINE`` is ``SOURCE`` assembled (``as``, ``objcopy -O binary -j .text``); a unit test assembles it and compares.

The layout of an entry is that of ``tcpstate/kernel/calls.py``.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["EPOLL_EVENT", "O_LARGEFILE", "ROUTINE", "SOURCE", "SYS", "WALK_SOURCE"]

#: include/uapi/asm-generic/fcntl.h
O_LARGEFILE: Final = 0o100000
#: struct epoll_event, packed: include/uapi/linux/eventpoll.h
EPOLL_EVENT: Final = "<IQ"


class SYS(enum.IntEnum):
    """System call numbers of x86-64, by the kernel's names (arch/x86/entry/syscalls/syscall_64.tbl)."""

    read = 0
    write = 1
    open = 2
    close = 3
    stat = 4
    fstat = 5
    lstat = 6
    poll = 7
    lseek = 8
    mmap = 9
    mprotect = 10
    munmap = 11
    brk = 12
    rt_sigaction = 13
    rt_sigprocmask = 14
    rt_sigreturn = 15
    ioctl = 16
    pread64 = 17
    pwrite64 = 18
    readv = 19
    writev = 20
    access = 21
    pipe = 22
    select = 23
    sched_yield = 24
    mremap = 25
    msync = 26
    mincore = 27
    madvise = 28
    shmget = 29
    shmat = 30
    shmctl = 31
    dup = 32
    dup2 = 33
    pause = 34
    nanosleep = 35
    getitimer = 36
    alarm = 37
    setitimer = 38
    getpid = 39
    sendfile = 40
    socket = 41
    connect = 42
    accept = 43
    sendto = 44
    recvfrom = 45
    sendmsg = 46
    recvmsg = 47
    shutdown = 48
    bind = 49
    listen = 50
    getsockname = 51
    getpeername = 52
    socketpair = 53
    setsockopt = 54
    getsockopt = 55
    clone = 56
    fork = 57
    vfork = 58
    execve = 59
    exit = 60
    wait4 = 61
    kill = 62
    uname = 63
    semget = 64
    semop = 65
    semctl = 66
    shmdt = 67
    msgget = 68
    msgsnd = 69
    msgrcv = 70
    msgctl = 71
    fcntl = 72
    flock = 73
    fsync = 74
    ftruncate = 77
    getcwd = 79
    chdir = 80
    fchdir = 81
    rename = 82
    mkdir = 83
    rmdir = 84
    link = 86
    unlink = 87
    symlink = 88
    readlink = 89
    chmod = 90
    fchmod = 91
    chown = 92
    fchown = 93
    umask = 95
    gettimeofday = 96
    getrlimit = 97
    getuid = 102
    getgid = 104
    setuid = 105
    setgid = 106
    geteuid = 107
    getegid = 108
    setpgid = 109
    getppid = 110
    getpgrp = 111
    setsid = 112
    setreuid = 113
    setregid = 114
    getgroups = 115
    setgroups = 116
    setresuid = 117
    getresuid = 118
    setresgid = 119
    getresgid = 120
    getpgid = 121
    setfsuid = 122
    setfsgid = 123
    getsid = 124
    capget = 125
    capset = 126
    rt_sigpending = 127
    rt_sigtimedwait = 128
    rt_sigqueueinfo = 129
    rt_sigsuspend = 130
    sigaltstack = 131
    personality = 135
    getpriority = 140
    setpriority = 141
    sched_setparam = 142
    sched_getparam = 143
    sched_setscheduler = 144
    sched_getscheduler = 145
    mlock = 149
    munlock = 150
    mlockall = 151
    munlockall = 152
    pivot_root = 155
    prctl = 157
    arch_prctl = 158
    setrlimit = 160
    chroot = 161
    mount = 165
    umount2 = 166
    sethostname = 170
    setdomainname = 171
    gettid = 186
    time = 201
    futex = 202
    sched_setaffinity = 203
    sched_getaffinity = 204
    set_thread_area = 205
    io_setup = 206
    io_destroy = 207
    io_getevents = 208
    io_submit = 209
    get_thread_area = 211
    epoll_create = 213
    set_tid_address = 218
    restart_syscall = 219
    semtimedop = 220
    timer_create = 222
    timer_settime = 223
    timer_gettime = 224
    timer_getoverrun = 225
    timer_delete = 226
    clock_settime = 227
    clock_gettime = 228
    clock_getres = 229
    clock_nanosleep = 230
    exit_group = 231
    epoll_wait = 232
    epoll_ctl = 233
    tgkill = 234
    mbind = 237
    set_mempolicy = 238
    get_mempolicy = 239
    waitid = 247
    keyctl = 250
    ioprio_set = 251
    ioprio_get = 252
    inotify_init = 253
    inotify_add_watch = 254
    inotify_rm_watch = 255
    openat = 257
    mkdirat = 258
    mknodat = 259
    fchownat = 260
    newfstatat = 262
    unlinkat = 263
    renameat = 264
    linkat = 265
    symlinkat = 266
    readlinkat = 267
    fchmodat = 268
    faccessat = 269
    pselect6 = 270
    ppoll = 271
    unshare = 272
    set_robust_list = 273
    get_robust_list = 274
    splice = 275
    tee = 276
    sync_file_range = 277
    vmsplice = 278
    utimensat = 280
    epoll_pwait = 281
    signalfd = 282
    timerfd_create = 283
    eventfd = 284
    fallocate = 285
    timerfd_settime = 286
    timerfd_gettime = 287
    accept4 = 288
    signalfd4 = 289
    eventfd2 = 290
    epoll_create1 = 291
    dup3 = 292
    pipe2 = 293
    inotify_init1 = 294
    preadv = 295
    pwritev = 296
    rt_tgsigqueueinfo = 297
    perf_event_open = 298
    recvmmsg = 299
    fanotify_init = 300
    fanotify_mark = 301
    prlimit64 = 302
    name_to_handle_at = 303
    open_by_handle_at = 304
    sendmmsg = 307
    setns = 308
    getcpu = 309
    process_vm_readv = 310
    process_vm_writev = 311
    kcmp = 312
    sched_setattr = 314
    sched_getattr = 315
    renameat2 = 316
    seccomp = 317
    getrandom = 318
    memfd_create = 319
    bpf = 321
    execveat = 322
    userfaultfd = 323
    membarrier = 324
    mlock2 = 325
    copy_file_range = 326
    preadv2 = 327
    pwritev2 = 328
    pkey_mprotect = 329
    pkey_alloc = 330
    pkey_free = 331
    statx = 332
    rseq = 334
    pidfd_send_signal = 424
    io_uring_setup = 425
    open_tree = 428
    move_mount = 429
    fsopen = 430
    fsconfig = 431
    fsmount = 432
    fspick = 433
    pidfd_open = 434
    clone3 = 435
    close_range = 436
    openat2 = 437
    pidfd_getfd = 438
    faccessat2 = 439
    process_madvise = 440
    epoll_pwait2 = 441
    mount_setattr = 442
    landlock_create_ruleset = 444
    landlock_add_rule = 445
    landlock_restrict_self = 446
    memfd_secret = 447
    process_mrelease = 448
    futex_waitv = 449
    set_mempolicy_home_node = 450
    map_shadow_stack = 453
    mseal = 462


#: In: r12 first entry, r13 end of the table.  Falls out at the label ``walked`` with r12 at the entry that failed or at
#: the end.  Changes rax, rcx, rdx, rsi, rdi, r8-r12 and the flags; keeps rbx, rbp, r13-r15, and touches no stack.
#: Uses the labels ``walk`` and ``walked`` and local labels 1-9.
WALK_SOURCE: Final = """\
walk:   cmp     r12, r13
        jae     walked
        mov     rax, [r12]
        mov     rdi, [r12 + 8]
        mov     rsi, [r12 + 16]
        mov     rdx, [r12 + 24]
        mov     r10, [r12 + 32]
        mov     r8, [r12 + 40]
        mov     r9, [r12 + 48]
        mov     ecx, [r12 + 72]         # flags; bits 8..13 (ch): arguments to be loaded from where they point
        test    ch, 0x3f
        jz      7f
        test    ch, 0x01
        jz      1f
        mov     rdi, [rdi]
1:      test    ch, 0x02
        jz      2f
        mov     rsi, [rsi]
2:      test    ch, 0x04
        jz      3f
        mov     rdx, [rdx]
3:      test    ch, 0x08
        jz      4f
        mov     r10, [r10]
4:      test    ch, 0x10
        jz      5f
        mov     r8, [r8]
5:      test    ch, 0x20
        jz      7f
        mov     r9, [r9]
7:      syscall
        mov     [r12 + 56], rax
        mov     rcx, [r12 + 64]
        test    rcx, rcx                # is the result wanted elsewhere, too?
        jz      8f
        mov     [rcx], rax
8:      cmp     rax, -4095              # unsigned: -4095 .. -1 are errors
        jb      9f
        test    byte ptr [r12 + 72], 1  # IGNORE_ERROR
        jz      walked
9:      add     r12, 80
        jmp     walk
walked:
"""

#: ``entry *routine(entry *first, entry *end)`` in the C calling convention: returns the entry that failed, or ``end``.
SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
        push    r12
        push    r13
        mov     r12, rdi
        mov     r13, rsi
{WALK_SOURCE}        mov     rax, r12
        pop     r13
        pop     r12
        ret
"""

ROUTINE: Final = bytes.fromhex(
    "415441554989fc4989f54d39ec0f8389000000498b0424498b7c2408498b742410498b5424184d8b"
    "5424204d8b4424284d8b4c2430418b4c2448f6c53f7430f6c5017403488b3ff6c5027403488b36f6"
    "c5047403488b12f6c50874034d8b12f6c51074034d8b00f6c52074034d8b090f054989442438498b"
    "4c24404885c97403488901483d01f0ffff720841f64424480174094983c450e96effffff4c89e041"
    "5d415cc3"
)
