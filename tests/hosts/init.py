"""PID 1 of a test host: makes the namespaces, mounts what is private, starts commands for others, reaps everything.

Run by `tests.hosts.host.Host` as ``python -m tests.hosts.init CONFIG`` (JSON: see `Config`).  Two processes:

    keeper   in the namespaces of the machine; makes the new ones, forks the init, waits for its end, removes its socket
    init     PID 1 inside; ends, and with it every process of the host, when the harness closes (or dies with) its end
             of the lifetime pipe, or when it is killed

Commands arrive on a unix socket in the directory of the net (see `tests.hosts.wire`): a path works from every network
namespace, and /tmp is shared by all hosts.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import selectors
import shlex
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from tests.hosts import wire
from tests.hosts.kernel import Clone, MountFlag, mount, set_hostname, unshare, write_sysctl

ABOVE_ALL_TARGETS = (
    200  # received descriptors are moved up here first, so that no dup2 overwrites one that is still needed
)
DEFAULT_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT]  # ignored by Python or by the shell that began it all
PRIVATE_TREES = {
    "/run": ["lock", "tcpmig"],
    "/var": ["cache", "lib/nginx", "lib/tcpmig", "log/nginx", "spool", "tmp"],
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a host is made with.

    name             its host name
    socket           path where commands are taken
    lifetime         descriptor of the pipe whose end of file ends the host
    uptime_offset    seconds added to CLOCK_MONOTONIC and CLOCK_BOOTTIME
    first_pid        processes get PIDs from here on
    environment      of commands that bring none
    """

    name: str
    socket: str
    lifetime: int
    uptime_offset: int
    first_pid: int
    environment: dict[str, str]


def main() -> int:
    """The keeper: make the namespaces, fork the init into them, wait for it."""
    config = Config(**json.loads(sys.argv[1]))
    # It came to us across an exec; the host's commands must not have it, they would hold a pipe of the harness.
    os.set_inheritable(config.lifetime, False)
    unshare(Clone.NEWNS | Clone.NEWUTS | Clone.NEWIPC | Clone.NEWPID | Clone.NEWNET | Clone.NEWTIME)
    # A time namespace takes its offsets only while nothing runs in it: the fork below is the first to enter.
    offsets = f"monotonic {config.uptime_offset} 0\nboottime {config.uptime_offset} 0\n"
    Path("/proc/self/timens_offsets").write_text(offsets)
    child = os.fork()
    if child == 0:
        _run_init(config)
    os.close(config.lifetime)
    _tell(f"pid {child}")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(config.socket).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the directory belongs to the harness and to the other hosts too
        Path(config.socket).parent.rmdir()
    return status if status >= 0 else 0


def _tell(line: str) -> None:
    """A line for the harness, in one write: keeper and init share the pipe."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _run_init(config: Config) -> NoReturn:
    """The forked child: it never returns into the keeper's code."""
    try:
        _mount_private(config)
        Init(config).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _mount_private(config: Config) -> None:
    """Mounts of this host: /proc, /sys (it belongs to the network namespace), /run, /var, /dev/shm, /dev/pts."""
    mount("none", "/", flags=MountFlag.PRIVATE | MountFlag.REC)
    plain = MountFlag.NOSUID | MountFlag.NODEV
    for tree, folders in PRIVATE_TREES.items():
        mount("tmpfs", tree, "tmpfs", plain, "mode=755")
        for folder in folders:
            Path(tree, folder).mkdir(parents=True)
    Path("/var/run").symlink_to("/run")
    Path("/var/lock").symlink_to("/run/lock")
    Path("/var/tmp").chmod(0o1777)
    mount("proc", "/proc", "proc", plain | MountFlag.NOEXEC)
    # The cgroup file systems are taken along into the new /sys; it is built aside, then moved into its place.
    aside = Path("/run/sys")
    aside.mkdir()
    mount("sysfs", str(aside), "sysfs", plain | MountFlag.NOEXEC)
    mount("/sys/fs/cgroup", str(aside / "fs/cgroup"), flags=MountFlag.BIND | MountFlag.REC)
    mount("bpf", str(aside / "fs/bpf"), "bpf", plain | MountFlag.NOEXEC, "mode=700")
    mount(str(aside), "/sys", flags=MountFlag.MOVE)
    aside.rmdir()
    mount("tmpfs", "/dev/shm", "tmpfs", plain, "mode=1777")
    mount("devpts", "/dev/pts", "devpts", MountFlag.NOSUID | MountFlag.NOEXEC, "newinstance,mode=600,ptmxmode=666")
    set_hostname(config.name)
    write_sysctl("kernel/ns_last_pid", config.first_pid - 1)


class Init:
    """The loop of PID 1."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._clients: dict[int, socket.socket] = {}  # PID of a command -> who wants its exit status
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wakeup, wakeup_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        os.environ["PATH"] = config.environment["PATH"]  # posix_spawnp looks programs up along our own

    def serve(self) -> NoReturn:
        """Until the harness is gone."""
        self._listener.bind(self._config.socket)
        self._listener.listen(64)
        for descriptor in (self._listener.fileno(), self._config.lifetime, self._wakeup):
            self._selector.register(descriptor, selectors.EVENT_READ)
        os.chdir("/")
        _tell("ready")
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._config.lifetime:
                    os._exit(0)
                elif key.fd == self._wakeup:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakeup, 4096)
                    self._reap()
                elif key.fd == self._listener.fileno():
                    client, _ = self._listener.accept()
                    self._selector.register(client, selectors.EVENT_READ, client)
                else:
                    self._selector.unregister(key.data)
                    self._take(key.data)

    def _take(self, client: socket.socket) -> None:
        """One request: start the command and answer."""
        data, ancillary, _, _ = client.recvmsg(
            wire.MAX_MESSAGE, socket.CMSG_SPACE(4 * wire.MAX_FDS), socket.MSG_CMSG_CLOEXEC
        )
        received = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(content)
        if not data:
            client.close()
            return
        try:
            pid = self._spawn(data, received.tolist())
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
            self._answer(client, wire.FAILED + f"{number} {error}".encode())
            client.close()
            return
        finally:
            for descriptor in received:
                os.close(descriptor)
        # The child is not reaped before the loop goes on, so its PID cannot have come into use again.
        pidfd = os.pidfd_open(pid)
        self._answer(client, wire.STARTED + b"%d" % pid, pidfd)
        os.close(pidfd)
        self._clients[pid] = client

    def _spawn(self, data: bytes, received: list[int]) -> int:
        environment, cwd, targets = self._config.environment, "/", [0, 1, 2]
        if data[:1] == wire.SHELL:
            argv = shlex.split(os.fsdecode(data[1:]))
        else:
            request = json.loads(data[1:])
            argv, cwd, targets = request["argv"], request["cwd"], request["fds"]
            environment = environment | request["env"]
        if not argv or len(targets) != len(received):
            raise ValueError(f"{len(received)} descriptors came with a request for {argv} that names {len(targets)}")
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE_ALL_TARGETS) for fd in received]
        try:
            os.chdir(cwd)  # posix_spawn has no working directory of its own; nothing else runs here meanwhile
            return self._start(argv, environment, dict(zip(targets, moved, strict=True)))
        finally:
            os.chdir("/")
            for descriptor in moved:
                os.close(descriptor)

    def _start(self, argv: list[str], environment: dict[str, str], descriptors: dict[int, int]) -> int:
        """The PID of the command, whose descriptors are those of ours that the values name."""
        return os.posix_spawnp(
            argv[0],
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in descriptors.items()],
            setsid=True,
            setsigmask=[],
            setsigdef=DEFAULT_SIGNALS,
        )

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client = self._clients.pop(pid, None)
            if client is not None:
                self._answer(client, wire.EXIT + b"%d" % os.waitstatus_to_exitcode(status))
                client.close()

    @staticmethod
    def _answer(client: socket.socket, message: bytes, *descriptors: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        # Who asked may have gone (rsh killed, as an ssh client may be): the command runs on, nobody wants its status.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendmsg([message], ancillary)


if __name__ == "__main__":
    sys.exit(main())
