"""One test host: its namespaces, its processes, its addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.hosts.kernel import Clone, in_namespace, write_sysctl
from tests.hosts.process import CommandFailed, HostProcess, Stream

__all__ = ["ROOT", "Host"]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
START_TIMEOUT = 20.0  # seconds until a new host must answer; the machine may be busy


class Host:
    """A machine on a `Net`; made by `Net.host`.

    name         its host name, and its name for rsh
    init         PID of its init for the harness (in the machine's PID namespace)
    ip4, ip6     its own addresses, without prefix length; empty before it is joined to a net
    """

    def __init__(self, name: str, directory: Path, *, uptime_offset: int = 0, first_pid: int = 300) -> None:
        self.name = name
        self.directory = directory
        self.socket = directory / f"{name}.sock"
        self.log = directory / f"{name}.log"
        self.ip4 = self.ip6 = ""
        self._closed = False
        lifetime, self._lifetime = os.pipe2(os.O_CLOEXEC)
        config = {
            "name": name,
            "socket": str(self.socket),
            "lifetime": lifetime,
            "uptime_offset": uptime_offset,
            "first_pid": first_pid,
            "environment": self._environment(),
        }
        with self.log.open("wb") as log:
            self._keeper = subprocess.Popen(
                [PYTHON, "-m", "tests.hosts.init", json.dumps(config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[lifetime],
                start_new_session=True,  # a Ctrl-C at the terminal is for the harness, which then closes the hosts
            )
        os.close(lifetime)
        try:
            # In either order: keeper and init run at the same time.
            words = dict(([*self._heard().split(), ""])[:2] for _ in range(2))
            self.init = int(words["pid"])
            self.netns = os.open(f"/proc/{self.init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._end()
            raise

    def _environment(self) -> dict[str, str]:
        """What commands in the host find: as after a login there, not what the harness has."""
        return {
            "PATH": f"{Path(PYTHON).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TMH_DIR": str(self.directory),
            "TMH_HOST": self.name,
        }

    def _heard(self) -> str:
        """The next line of keeper or init."""
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline().decode()
        if not line:
            self._keeper.wait(START_TIMEOUT)
            raise RuntimeError(f"test host {self.name} did not start: {self.log.read_text().strip()}")
        return line

    # ---- commands

    def popen(
        self,
        argv: Sequence[object],
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        cwd: str | os.PathLike[str] = "/",
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> HostProcess:
        """Start a command, in a session of its own. Raises FileNotFoundError and the like as subprocess.Popen does."""
        return HostProcess(
            str(self.socket), argv, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env, pass_fds=pass_fds
        )

    def run(
        self,
        argv: Sequence[object],
        *,
        data: bytes | str | None = None,
        check: bool = True,
        timeout: float = 60,
        cwd: str | os.PathLike[str] = "/",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with its output. Raises CommandFailed unless `check` is False."""
        given = data.encode() if isinstance(data, str) else data
        pipe = subprocess.PIPE
        with self.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=env) as process:
            out, err = process.communicate(given, timeout)
        result = subprocess.CompletedProcess(
            process.args, process.wait(), out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and result.returncode:
            raise CommandFailed(
                f"{self.name}: {' '.join(result.args)} ended with {result.returncode}\n{result.stdout}{result.stderr}"
            )
        return result

    def sh(self, script: str, *, check: bool = True, timeout: float = 60) -> str:
        """What a shell script prints."""
        return self.run(["/bin/sh", "-ec", script], check=check, timeout=timeout).stdout

    # ---- looking inside

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """The harness's path of a file of the host (its /proc, /run and /var are its own)."""
        return Path(f"/proc/{self.init}/root") / os.fspath(inside).lstrip("/")

    def processes(self) -> dict[int, str]:
        """PID inside the host -> command name, the init included."""
        found = {}
        for entry in self.path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended meanwhile
        return found

    def state(self, pid: int) -> str:
        """The state letter of a process of the host (R S D T t Z), empty if there is none with that PID."""
        try:
            stat = self.path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return stat.rpartition(")")[2].split()[0]

    def kill(self, pid: int, number: int) -> None:
        """A signal to any process of the host, by its PID there (also one that was restored or migrated)."""
        self.run(["kill", f"-{int(number)}", "--", pid])

    def uptime(self) -> float:
        """Seconds since this host was booted, as it sees it (CLOCK_BOOTTIME)."""
        return float(self.run(["cat", "/proc/uptime"]).stdout.split()[0])

    # ---- network

    def netns_entered(self) -> AbstractContextManager[None]:
        """The calling thread makes sockets (and children) in this host's network within the block."""
        return in_namespace(self.netns, Clone.NEWNET)

    def ip(self, *lines: str) -> None:
        """Run commands of `ip`, each a line without the leading ``ip``, in one process."""
        self.run(["ip", "-batch", "-"], data="\n".join(lines) + "\n")

    def sysctl(self, **values: object) -> None:
        """Set sysctls of the host's network: ``net__ipv4__ip_forward=0``."""
        with self.netns_entered():
            for name, value in values.items():
                write_sysctl(name.replace("__", "/"), value)

    def add_address(self, address: str, device: str = "eth0") -> None:
        """Add ADDRESS/LENGTH; IPv6 without duplicate address detection, so that it is usable at once."""
        self.ip(f"addr add {address} dev {device}" + (" nodad" if ":" in address else ""))
        # a work queue of the kernel makes an IPv6 address local a moment later (addrconf_dad_start)
        shown = ["ip", "-6", "route", "show", "table", "local", address.partition("/")[0], "dev", device]
        while ":" in address and not self.run(shown).stdout:
            time.sleep(0.002)

    def remove_address(self, address: str, device: str = "eth0") -> None:
        """Remove ADDRESS/LENGTH."""
        self.ip(f"addr del {address} dev {device}")

    def addresses(self, device: str = "eth0") -> set[str]:
        """ADDRESS/LENGTH of all addresses of global scope."""
        shown = json.loads(self.run(["ip", "-j", "addr", "show", "dev", device]).stdout)
        return {
            f"{a['local']}/{a['prefixlen']}"
            for link in shown
            for a in link.get("addr_info", [])
            if a["scope"] == "global"
        }

    @contextmanager
    def loss(self, percent: int, *, port: int, incoming: bool = True, outgoing: bool = True) -> Iterator[None]:
        """Random loss of TCP segments from and to a port, each way, within the block (netem is absent here).

        Outgoing segments are dropped before, incoming ones after the place where an AF_PACKET socket of this host sees
        them. 100 drops all.
        """
        drop = "drop" if percent >= 100 else f"numgen random mod 100 < {percent} drop"
        match = "\n".join(f"  tcp {end} {port} {drop}" for end in ("sport", "dport"))
        ways = [way for way, wanted in (("input", incoming), ("output", outgoing)) if wanted]
        chains = "\n".join(f" chain {way} {{\n  type filter hook {way} priority 0\n{match}\n }}" for way in ways)
        self.run(["nft", "-f", "-"], data=f"table inet tmh_loss {{\n{chains}\n}}\n")
        try:
            yield
        finally:
            self.run(["nft", "delete", "table", "inet", "tmh_loss"])

    # ---- end

    def close(self) -> None:
        """End every process of the host; its namespaces go with them."""
        if not self._closed:
            self._closed = True
            self._end()
            os.close(self.netns)

    def _end(self) -> None:
        # End of file on the lifetime pipe: the init exits and the kernel kills whatever runs below it.
        os.close(self._lifetime)
        try:
            self._keeper.wait(5)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait(5)
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()
        self.log.unlink(missing_ok=True)

    def wait_until_gone(self, pid: int, timeout: float = 10) -> None:
        """Until no process has that PID here. Raises CommandFailed."""
        end = time.monotonic() + timeout
        while self.state(pid) not in ("", "Z"):
            if time.monotonic() > end:
                raise CommandFailed(f"{self.name}: pid {pid} still runs after {timeout} s")
            time.sleep(0.01)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Host({self.name!r}, init={self.init})"
