"""aarch64: numbers of system calls, and the routine that walks a table of them.

There are none of the older calls that others have taken the place of: no open, poll, pipe, dup2, epoll_wait, fork.

Source: include/uapi/asm-generic/unistd.h; arch/arm64/kernel/entry.S (all registers but x0 are kept).
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["EPOLL_EVENT", "O_LARGEFILE", "ROUTINE", "SOURCE", "SYS", "WALK_SOURCE"]

#: arch/arm64/include/uapi/asm/fcntl.h
O_LARGEFILE: Final = 0o400000
#: struct epoll_event, include/uapi/linux/eventpoll.h
EPOLL_EVENT: Final = "<I4xQ"


class SYS(enum.IntEnum):
    """System call numbers."""

    io_setup = 0
    io_destroy = 1
    io_submit = 2
    io_getevents = 4
    getcwd = 17
    eventfd2 = 19
    epoll_create1 = 20
    epoll_ctl = 21
    epoll_pwait = 22
    dup = 23
    dup3 = 24
    fcntl = 25
    inotify_init1 = 26
    inotify_add_watch = 27
    inotify_rm_watch = 28
    ioctl = 29
    ioprio_set = 30
    ioprio_get = 31
    flock = 32
    mknodat = 33
    mkdirat = 34
    unlinkat = 35
    symlinkat = 36
    linkat = 37
    renameat = 38
    umount2 = 39
    mount = 40
    pivot_root = 41
    ftruncate = 46
    fallocate = 47
    faccessat = 48
    chdir = 49
    fchdir = 50
    chroot = 51
    fchmod = 52
    fchmodat = 53
    fchownat = 54
    fchown = 55
    openat = 56
    close = 57
    pipe2 = 59
    lseek = 62
    read = 63
    write = 64
    readv = 65
    writev = 66
    pread64 = 67
    pwrite64 = 68
    preadv = 69
    pwritev = 70
    sendfile = 71
    pselect6 = 72
    ppoll = 73
    signalfd4 = 74
    vmsplice = 75
    splice = 76
    tee = 77
    readlinkat = 78
    newfstatat = 79
    fstat = 80
    fsync = 82
    sync_file_range = 84
    timerfd_create = 85
    timerfd_settime = 86
    timerfd_gettime = 87
    utimensat = 88
    capget = 90
    capset = 91
    personality = 92
    exit = 93
    exit_group = 94
    waitid = 95
    set_tid_address = 96
    unshare = 97
    futex = 98
    set_robust_list = 99
    get_robust_list = 100
    nanosleep = 101
    getitimer = 102
    setitimer = 103
    timer_create = 107
    timer_gettime = 108
    timer_getoverrun = 109
    timer_settime = 110
    timer_delete = 111
    clock_settime = 112
    clock_gettime = 113
    clock_getres = 114
    clock_nanosleep = 115
    sched_setparam = 118
    sched_setscheduler = 119
    sched_getscheduler = 120
    sched_getparam = 121
    sched_setaffinity = 122
    sched_getaffinity = 123
    sched_yield = 124
    restart_syscall = 128
    kill = 129
    tgkill = 131
    sigaltstack = 132
    rt_sigsuspend = 133
    rt_sigaction = 134
    rt_sigprocmask = 135
    rt_sigpending = 136
    rt_sigtimedwait = 137
    rt_sigqueueinfo = 138
    rt_sigreturn = 139
    setpriority = 140
    getpriority = 141
    setregid = 143
    setgid = 144
    setreuid = 145
    setuid = 146
    setresuid = 147
    getresuid = 148
    setresgid = 149
    getresgid = 150
    setfsuid = 151
    setfsgid = 152
    setpgid = 154
    getpgid = 155
    getsid = 156
    setsid = 157
    getgroups = 158
    setgroups = 159
    uname = 160
    sethostname = 161
    setdomainname = 162
    getrlimit = 163
    setrlimit = 164
    umask = 166
    prctl = 167
    getcpu = 168
    gettimeofday = 169
    getpid = 172
    getppid = 173
    getuid = 174
    geteuid = 175
    getgid = 176
    getegid = 177
    gettid = 178
    msgget = 186
    msgctl = 187
    msgrcv = 188
    msgsnd = 189
    semget = 190
    semctl = 191
    semtimedop = 192
    semop = 193
    shmget = 194
    shmctl = 195
    shmat = 196
    shmdt = 197
    socket = 198
    socketpair = 199
    bind = 200
    listen = 201
    accept = 202
    connect = 203
    getsockname = 204
    getpeername = 205
    sendto = 206
    recvfrom = 207
    setsockopt = 208
    getsockopt = 209
    shutdown = 210
    sendmsg = 211
    recvmsg = 212
    brk = 214
    munmap = 215
    mremap = 216
    keyctl = 219
    clone = 220
    execve = 221
    mmap = 222
    mprotect = 226
    msync = 227
    mlock = 228
    munlock = 229
    mlockall = 230
    munlockall = 231
    mincore = 232
    madvise = 233
    mbind = 235
    get_mempolicy = 236
    set_mempolicy = 237
    rt_tgsigqueueinfo = 240
    perf_event_open = 241
    accept4 = 242
    recvmmsg = 243
    wait4 = 260
    prlimit64 = 261
    fanotify_init = 262
    fanotify_mark = 263
    name_to_handle_at = 264
    open_by_handle_at = 265
    setns = 268
    sendmmsg = 269
    process_vm_readv = 270
    process_vm_writev = 271
    kcmp = 272
    sched_setattr = 274
    sched_getattr = 275
    renameat2 = 276
    seccomp = 277
    getrandom = 278
    memfd_create = 279
    bpf = 280
    execveat = 281
    userfaultfd = 282
    membarrier = 283
    mlock2 = 284
    copy_file_range = 285
    preadv2 = 286
    pwritev2 = 287
    pkey_mprotect = 288
    pkey_alloc = 289
    pkey_free = 290
    statx = 291
    rseq = 293
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
    mseal = 462


#: In: x20 first entry, x21 end of the table.  Falls out at the label ``walked`` with x20 at the entry that failed or at
#: the end.  Changes x0-x5, x8-x10, x20 and the flags; keeps x21-x30, and touches no stack.
#: Uses the labels ``walk`` and ``walked`` and local labels 1-9.
WALK_SOURCE: Final = """\
walk:   cmp     x20, x21
        b.hs    walked
        ldp     x8, x0, [x20]
        ldp     x1, x2, [x20, 16]
        ldp     x3, x4, [x20, 32]
        ldr     x5, [x20, 48]
        ldr     x9, [x20, 72]           // flags; bits 8..13: arguments to be loaded from where they point
        tbz     x9, 8, 1f
        ldr     x0, [x0]
1:      tbz     x9, 9, 2f
        ldr     x1, [x1]
2:      tbz     x9, 10, 3f
        ldr     x2, [x2]
3:      tbz     x9, 11, 4f
        ldr     x3, [x3]
4:      tbz     x9, 12, 5f
        ldr     x4, [x4]
5:      tbz     x9, 13, 7f
        ldr     x5, [x5]
7:      svc     0
        ldr     x10, [x20, 64]
        str     x0, [x20, 56]
        cbz     x10, 8f                 // is the result wanted elsewhere, too?
        str     x0, [x10]
8:      cmn     x0, 4095                // carry: -4095 .. -1, which are errors
        b.lo    9f
        tbz     x9, 0, walked           // IGNORE_ERROR
9:      add     x20, x20, 80
        b       walk
walked:
"""

#: ``entry *routine(entry *first, entry *end)`` in the C calling convention: returns the entry that failed, or ``end``.
SOURCE: Final = f"""\
        .text
        stp     x20, x21, [sp, -16]!
        mov     x20, x0
        mov     x21, x1
{WALK_SOURCE}        mov     x0, x20
        ldp     x20, x21, [sp], 16
        ret
"""

ROUTINE: Final = bytes.fromhex(
    "f457bfa9f40300aaf50301aa9f0215eb82030054880240a9810a41a9831242a9851a40f9892640f9"
    "49004036000040f949004836210040f949005036420040f949005836630040f949006036840040f9"
    "49006836a50040f9010000d48a2240f9801e00f94a0000b4400100f91ffc3fb14300005469000036"
    "94420191e4ffff17e00314aaf457c1a8c0035fd6"
)
