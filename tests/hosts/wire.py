"""What the init of a test host is told, and what it answers: messages on a SOCK_SEQPACKET unix socket.

One connection is one command.

    request   b"J" + JSON {argv, env, cwd, fds: [numbers that the passed descriptors shall have]}   (Host.popen)
              b"S" + shell-like command line, descriptors 0 1 2                                     (rsh, as with ssh)
    answers   b"pid N", with a pidfd attached       the command runs
              b"exit N"                             it ended; N as in subprocess: below zero = killed by that signal
              b"error ERRNO TEXT"                   it could not be started

The commands are children of the init, as those of sshd are: no namespace is entered from outside.
"""

from __future__ import annotations

__all__ = ["EXIT", "FAILED", "MAX_FDS", "MAX_MESSAGE", "REQUEST", "SHELL", "STARTED"]

REQUEST = b"J"
SHELL = b"S"
STARTED = b"pid "
EXIT = b"exit "
FAILED = b"error "
MAX_MESSAGE = 128 << 10  # environment and arguments; below the default socket buffer of 208 KiB
MAX_FDS = 64
