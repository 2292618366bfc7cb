"""What a process of ours must be that outlives the command that started it: holders, and those who bring pages.

A control group of its own (that of the command may end with a session of ssh), no descriptors of the command's, no
standard streams, no end by a hang-up or for want of memory, and a log like those of commands.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import time

from checkpoint.state.cgroup import mounts
from migrate.hostfacts import state_directory

__all__ = ["detach", "go_home", "keep_log", "prepare"]

_log = logging.getLogger(__name__)

#: of a process that the kernel is not to kill for want of memory (proc(5), oom_score_adj)
_NEVER = "-1000"
_ROOMS = ("tcpstate", "checkpoint", "migrate")


def prepare(kind: str, identity: str) -> str:
    """Become such a process, ``tcpmig-KIND`` by name; the control group that was made, or nothing."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # the tool may have held signals back when it started us
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name, text in (("comm", f"tcpmig-{kind}"), ("oom_score_adj", _NEVER)):
        try:
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            # without CAP_SYS_RESOURCE
            _log.info("%s: %s", name, error.strerror)
    return _leave(f"tcpmig-{kind}-{identity}")


def detach(kept: int) -> None:
    """In a fork of the command: a session of its own, /dev/null for standard streams, no descriptor but ``kept``."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _leave(name: str) -> str:
    """Leave the tool's control groups, which may end with a session of ssh; the one that was made, or nothing."""
    made = ""
    for mount in mounts():
        place = mount.at
        # of the old hierarchies the root will do: only in a group of the unified one can a service manager end us
        if not mount.hierarchy:
            own = os.path.join(mount.at, name)
            try:
                # another of the same may have made it
                os.makedirs(own, exist_ok=True)
                made = place = own
            except OSError as error:
                _log.warning("no control group of its own: %s", error)
        _enter(place)
    return made


def _enter(place: str) -> None:
    try:
        with open(os.path.join(place, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        _log.warning("cannot enter %s: %s", place, error.strerror)


def keep_log(kind: str, about: str) -> None:
    """A log like those of commands, names and numbers, and nothing else that is logged to."""
    for room in (None, *_ROOMS):
        logger = logging.getLogger(room)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    folder = state_directory() / "log"
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{stamp}-{kind}-{os.getpid()}.log"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        # to do the work without a log is better than not to do it
        logging.getLogger().addHandler(logging.NullHandler())
        return
    handler = logging.StreamHandler(os.fdopen(descriptor, "w", encoding="utf-8", errors="replace"))
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    for room in _ROOMS:
        logging.getLogger(room).addHandler(handler)
        logging.getLogger(room).setLevel(logging.INFO)
    _log.info("%s", about)


def go_home(cgroup: str) -> None:
    """Out of the control group that was made, so that it can be removed, by us or by the last in it."""
    if cgroup:
        _enter(os.path.dirname(cgroup))
        with contextlib.suppress(OSError):
            os.rmdir(cgroup)
