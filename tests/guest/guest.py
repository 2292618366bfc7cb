"""A guest, seen from the host: started, given commands, ended."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from tests.guest import agent, debian

__all__ = ["Guest", "Nic"]

#: of Debian's qemu 7.2, and where younger releases have it
_VIRTIOFSD: Final = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
#: by machine: the program, its board, and the console
_QEMU: Final = {
    "x86_64": ("qemu-system-x86_64", "q35", "ttyS0"),
    "aarch64": ("qemu-system-aarch64", "virt", "ttyAMA0"),
}
#: emulated: no 5-level paging and what else newer machines have not; pointer authentication in a cheap way
_EMULATED: Final = {
    "x86_64": ("-accel", "tcg,thread=multi", "-cpu", "max,-la57,-mpx,-3dnow,-3dnowext,-svm"),
    "aarch64": ("-accel", "tcg,thread=multi", "-cpu", "max,pauth-impdef=on"),
}
_VIRTUAL: Final = ("-accel", "kvm", "-cpu", "host")
#: environment variable: with /dev/kvm, which is there on many machines where it does not work
_KVM: Final = "TCPMIG_GUEST_KVM"
_KERNEL_OPTIONS: Final = (
    "quiet panic=-1 mitigations=off nokaslr cryptomgr.notests tsc=reliable no_timer_check random.trust_cpu=on"
)
_MEMORY: Final = 1024  # MiB
_UP: Final = 90.0  # seconds
_PAUSE: Final = 0.02
#: if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TAP: Final = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR


@dataclass(frozen=True, slots=True)
class Nic:
    """An interface of a guest: a port of a bridge.

    netns      the bridge's network namespace: its name (``ip netns``), or the path of a file that holds it
    bridge     its name
    addresses  of the guest there, with their prefix lengths
    """

    netns: str
    bridge: str
    addresses: tuple[str, ...]
    tap: str = field(default_factory=lambda: f"g{secrets.token_hex(4)}")
    hardware: str = field(default_factory=lambda: "52:54:00:" + ":".join(f"{b:02x}" for b in secrets.token_bytes(3)))


class Guest:
    """A running machine, ended with the ``with`` block.

    meta   Debian's meta-package of its kernel
    nics   its interfaces, eth0 and so on
    see    folders of this machine that one with a root of its own sees at the same paths, to read
    cpus   how many
    """

    def __init__(
        self,
        meta: str = debian.META_PACKAGE,
        *,
        nics: Sequence[Nic] = (),
        name: str = "guest",
        see: Sequence[Path] = (),
        cpus: int = 2,
    ) -> None:
        self.kernel = debian.fetch(meta)
        self.name = name
        self._token = secrets.token_hex(16)
        self._nics = nics
        self._cpus = cpus
        self._see = (*see, self.kernel.modules) if self.kernel.root else ()
        self._stack = contextlib.ExitStack()
        self._port = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tcpmig-guest-")))
        initrd = self.folder / "initrd"
        python = "/usr/bin/python3" if self.kernel.root else os.path.realpath(sys.executable)
        initrd.write_bytes(debian.initramfs(self.kernel, Path(agent.__file__), python, self._see))
        program, board, console = _QEMU[self.kernel.machine]
        emulated = _EMULATED[self.kernel.machine]
        shares = {"root": self.kernel.root or Path("/")} | {f"see{i}": path for i, path in enumerate(self._see)}
        control = "52:54:00:00:00:01"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        told = {
            "name": self.name,
            "token": self._token,
            "nics": [[control, "control", f"{agent.ADDRESS}/24"]]
            + [[nic.hardware, f"eth{i}", *nic.addresses] for i, nic in enumerate(self._nics)],
        }
        forward = f"hostfwd=tcp:127.0.0.1:{self._port}-{agent.ADDRESS}:{agent.PORT}"
        command = [
            program, "-machine", f"{board},memory-backend=mem",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            *(_VIRTUAL if os.environ.get(_KVM) else emulated), "-smp", str(self._cpus), "-m", str(_MEMORY),
            "-object", f"memory-backend-memfd,id=mem,size={_MEMORY}M,share=on",
            "-kernel", str(self.kernel.image), "-initrd", str(initrd),
            "-append", f"console={console} {_KERNEL_OPTIONS} tcpmig={_encoded(told)}",
            "-serial", f"file:{self.folder}/console.log",
            # restrict: the guest reaches nothing of this machine by it
            "-netdev", f"user,id=control,restrict=on,{forward}",
            "-device", f"virtio-net-pci,netdev=control,mac={control},romfile=",
        ]  # fmt: skip
        for tag, source in shares.items():
            command += ["-chardev", f"socket,id={tag},path={self._share(tag, source)}"]
            command += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"]
        taps = [self._tap(nic) for nic in self._nics]
        for i, (nic, tap) in enumerate(zip(self._nics, taps, strict=True)):
            command += ["-netdev", f"tap,id=n{i},fd={tap}"]
            command += ["-device", f"virtio-net-pci,netdev=n{i},mac={nic.hardware},romfile="]
        self._run(command, taps, self._up)

    def _share(self, tag: str, source: Path) -> Path:
        """Serve a folder of this machine; the path of the socket."""
        path = self.folder / f"{tag}.sock"
        program = next(filter(os.path.exists, _VIRTIOFSD))
        options = f"source={source},sandbox=chroot,cache=always,flock,posix_lock,log_level=err"
        argv = [program, "-f", f"--socket-path={path}", *(word for o in options.split(",") for word in ("-o", o))]
        self._run(argv, (), path.exists)
        return path

    def _run(self, argv: Sequence[str], fds: Sequence[int], ready: Callable[[], bool]) -> None:
        """A process of this guest, ended with it. RuntimeError if it ends, or is not ready in time."""
        log = self.folder / f"{Path(argv[0]).name}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=fds, start_new_session=True
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        end = time.monotonic() + _UP
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{argv[0]} did not come up: {log.read_text()}{self.console()}")
            time.sleep(_PAUSE)

    def console(self) -> str:
        """What its kernel has said."""
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _up(self) -> bool:
        return agent.READY in self.console()

    def _tap(self, nic: Nic) -> int:
        """A tap on the bridge, as a descriptor: it vanishes when it is closed."""
        made: list[int] = []

        def work() -> None:
            # setns() changes the calling thread only
            with open(Path("/run/netns") / nic.netns) as netns:
                if ctypes.CDLL(None, use_errno=True).setns(netns.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"entering {nic.netns}")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", nic.tap.encode(), _TAP))
            subprocess.run(["ip", "link", "set", nic.tap, "master", nic.bridge, "up"], check=True)
            made.append(fd)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if not made:
            raise RuntimeError(f"no tap in {nic.netns}")
        return made[0]

    def connect(
        self, argv: Sequence[str], *, cwd: str | Path = "/", env: Mapping[str, str] | None = None
    ) -> socket.socket:
        """A command begun in the guest; frames of :mod:`tests.guest.agent` go both ways. Closed, it ends."""
        return begin(self._where(), argv, str(cwd), dict(env or {}))

    def _where(self) -> dict[str, object]:
        return {"address": "127.0.0.1", "port": self._port, "token": self._token}

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str | Path = "/",
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """A command run in the guest. TimeoutError, after which it is killed; RuntimeError if the guest has gone."""
        found = {agent.OUT: bytearray(), agent.ERR: bytearray()}
        with self.connect(argv, cwd=cwd, env=env) as sock:
            sock.settimeout(timeout)

            def feed() -> None:
                # the command may end without having read it all
                with contextlib.suppress(OSError):
                    for start in range(0, len(stdin), agent.CHUNK):
                        agent.send(sock, agent.IN, stdin[start : start + agent.CHUNK])
                    agent.send(sock, agent.IN, b"")

            threading.Thread(target=feed, daemon=True).start()
            while (frame := agent.receive(sock)) is not None and frame[0] != agent.STATUS:
                found[frame[0]] += frame[1]
        if frame is None:
            raise RuntimeError(f"the guest has gone: {self.console()}")
        out, err = (bytes(found[kind]).decode(errors="replace") for kind in (agent.OUT, agent.ERR))
        return subprocess.CompletedProcess(list(argv), int(frame[1]), out, err)

    def remote_shell(self) -> list[str]:
        """A command that runs others in the guest, as ssh does: ``[*it, HOST, COMMAND]``. It works in every network
        namespace of this machine that sees /tmp."""
        where, door = self.folder / "where.json", self.folder / "door.sock"
        if not where.exists():
            self._open(door)
            where.touch(mode=0o600)
            where.write_text(json.dumps(self._where() | {"door": str(door)}))
        return [sys.executable, str(Path(__file__).with_name("rsh.py")), str(where)]

    def _open(self, path: Path) -> None:
        """Connections to the agent, handed out by a unix socket: a socket stays in the namespace it was made in."""
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    asking, _ = listener.accept()
                except OSError:
                    return  # closed: the guest ends
                with asking, socket.create_connection(("127.0.0.1", self._port)) as line:
                    socket.send_fds(asking, [b"."], [line.fileno()])

        threading.Thread(target=serve, daemon=True).start()
        # close() alone does not wake who waits in accept()
        self._stack.callback(listener.shutdown, socket.SHUT_RDWR)


def _encoded(told: Mapping[str, object]) -> str:
    return base64.b64encode(json.dumps(told).encode()).decode()


def begin(where: Mapping[str, object], argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> socket.socket:
    """A command begun by the agent that listens there, reached by its door if it has one."""
    if "door" in where:
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(str(where["door"]))
            sock = socket.socket(fileno=socket.recv_fds(door, 1, 1)[1][0])
    else:
        sock = socket.create_connection((str(where["address"]), int(str(where["port"]))))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    asked = {"token": where["token"], "argv": list(map(str, argv)), "cwd": cwd, "env": dict(env)}
    sock.sendall(json.dumps(asked).encode() + b"\n")
    return sock
