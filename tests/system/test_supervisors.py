"""Who supervises a process is named and refused, or left to a hook; what has moved is outside of what brought it.

There is no systemd here: the cgroups are real, `systemctl` is a script of the test's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.state.cgroup import mounts
from tests.hosts import Host, ThreeHosts, tcpmig
from tests.hosts.process import HostProcess
from tests.hosts.shared import at_home, hosts
from tests.hosts.tcpmig import MigrationFailed

__all__ = ["at_home", "hosts"]

HOOK = """
import json, os, sys
said = json.load(sys.stdin)
names = [name for name in os.environ if name.startswith("TCPMIG_") and not name.endswith("_DIR")]
with open(sys.argv[1], "a") as log:
    print(json.dumps({"said": said, "environment": {name: os.environ[name] for name in names}}), file=log)
if sys.argv[2:] == [said["hook"]]:
    sys.exit("no, not now")
"""


def hierarchies() -> list[Path]:
    """Where systemd has its groups, and version 2 beside it."""
    found = [Path(m.at) for m in mounts() if m.hierarchy in (frozenset(), frozenset({"name=systemd"}))]
    assert found, "no cgroup hierarchy is mounted"
    return found


@contextlib.contextmanager
def group(path: str) -> Iterator[list[Path]]:
    """A cgroup of that path in each of the hierarchies; whoever is left in it at the end goes to the root."""
    made = [at / path for at in hierarchies()]
    for folder in made:
        folder.mkdir(parents=True)
    try:
        yield made
    finally:
        for at, folder in zip(hierarchies(), made, strict=True):
            for pid in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (at / "cgroup.procs").write_text(pid)
            while folder != at:
                folder.rmdir()
                folder = folder.parent


@pytest.fixture
def process(hosts: ThreeHosts) -> Iterator[HostProcess]:
    with hosts.source.popen(["sleep", "1000"]) as sleeper:
        yield sleeper


@pytest.fixture
def service(process: HostProcess) -> Iterator[str]:
    """The process is in the cgroup of a unit of that name."""
    name = f"demo-{os.getpid()}.service"
    with group(f"tcpmigtest{os.getpid()}.slice/{name}") as folders:
        for folder in folders:
            (folder / "cgroup.procs").write_text(str(process.outer_pid))
        yield name


class Systemd:
    """A `systemctl` that knows one unit; without properties it says that there is no systemd."""

    def __init__(self, folder: Path, unit: str) -> None:
        self.path, self.unit = folder / "systemctl", unit
        self.tell()

    def tell(self, **properties: object) -> None:
        lines = "".join(f"{name}={value}\n" for name, value in properties.items())
        answer = f"""case "$*" in *" -- {self.unit}") printf '%s' {shlex.quote(lines)};; *) exit 1;; esac"""
        self.path.write_text(f"#!/bin/sh\n{answer if properties else 'echo System has not been booted >&2; exit 1'}\n")
        self.path.chmod(0o755)

    def run(self, host: Host, *arguments: object) -> tuple[int, dict[str, object]]:
        """tcpmig in a host where this is the `systemctl`."""
        path = f"{self.path.parent}:{os.environ['PATH']}"
        done = host.run([*tcpmig.TCPMIG, *arguments, "--json"], check=False, env={"PATH": path})
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def systemd(tmp_path: Path, service: str) -> Systemd:
    (tmp_path / "bin").mkdir()
    return Systemd(tmp_path / "bin", service)


def supervisor_of(answer: dict[str, object]) -> list[dict[str, str]]:
    verdicts = answer["verdicts"]
    assert isinstance(verdicts, list)
    return [verdict for verdict in verdicts if verdict["kind"] == "supervisor"]


def test_a_unit_with_restart_is_named_and_refused(
    hosts: ThreeHosts, process: HostProcess, service: str, systemd: Systemd, tmp_path: Path
) -> None:
    pid = process.pid
    systemd.tell(LoadState="loaded", MainPID=pid, Restart="always", Type="simple")
    status, answer = systemd.run(hosts.source, "check", pid)
    (verdict,) = supervisor_of(answer)
    assert (status, verdict["code"], verdict["subject"]) == (3, "TM-0384", f"pid {pid}")
    assert service in verdict["text"]
    assert "Restart=always" in verdict["text"]
    status, answer = systemd.run(hosts.source, "check", pid, "--unit-hook", "true")
    (verdict,) = supervisor_of(answer)
    assert (status, verdict["status"]) == (0, "warn")

    rsh = ["--rsh", shlex.join(tcpmig.RSH), "--remote-command", shlex.join([*tcpmig.TCPMIG, "receive"])]
    image = tmp_path / "image"
    for refused in (["migrate", pid, "target", *rsh], ["checkpoint", pid, "-o", image]):
        status, answer = systemd.run(hosts.source, *refused)
        assert (status, answer["code"]) == (3, "TM-0384")
    # it runs on: nobody would notice
    status, answer = systemd.run(hosts.source, "checkpoint", pid, "-R", "-o", image)
    assert (status, answer["outcome"]) == (0, "done")
    assert hosts.source.state(pid) == "S"

    systemd.tell(LoadState="loaded", MainPID=pid, Restart="no")
    status, answer = systemd.run(hosts.source, "migrate", pid, "target", *rsh)
    assert (status, answer["code"]) == (3, "TM-0385")


def test_without_systemd_the_unit_files_tell(
    hosts: ThreeHosts, process: HostProcess, service: str, systemd: Systemd
) -> None:
    folder = "/run/systemd/system"
    hosts.source.sh(f"mkdir -p {folder}/{service}.d; printf '[Service]\\nRestart=on-failure\\n' >{folder}/{service}")
    status, answer = systemd.run(hosts.source, "check", process.pid)
    assert (status, supervisor_of(answer)[0]["code"]) == (3, "TM-0384")
    hosts.source.sh(f"printf '[Service]\\nRestart=no\\n' >{folder}/{service}.d/keep.conf")
    # a child of init is what systemd started
    status, answer = systemd.run(hosts.source, "check", process.pid)
    assert (status, supervisor_of(answer)[0]["code"]) == (3, "TM-0385")
    hosts.source.sh(f"rm -r {folder}")


def test_a_supervising_parent_is_refused_and_another_is_named(hosts: ThreeHosts, tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '1000']); print('up', flush=True); sys.stdin.read()"
    for name, status, code in (("supervisord", 3, "TM-0386"), ("other", 0, "")):
        (tmp_path / name).write_text(script)
        with hosts.source.popen([sys.executable, tmp_path / name], stdin=-1, stdout=-1) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"up\n"
            child = int(hosts.source.sh(f"cat /proc/{parent.pid}/task/{parent.pid}/children"))
            found, answer, _ = tcpmig.tcpmig(hosts.source, "check", child)
            (verdict,) = supervisor_of(answer)
            assert (found, verdict["code"]) == (status, code)
            assert str(parent.pid) in verdict["text"]
            hosts.source.kill(child, signal.SIGKILL)


class Hooks:
    """Hooks on both hosts that write down what they are told; `migrate` fails with MigrationFailed."""

    def __init__(self, hosts: ThreeHosts, folder: Path) -> None:
        self._hosts, self._log = hosts, folder / "log"
        (folder / "hook.py").write_text(HOOK)
        self.command = shlex.join([sys.executable, str(folder / "hook.py"), str(self._log)])

    def migrate(self, pid: int, *, source: str = "", target: str = "") -> dict[str, object]:
        receive = [*tcpmig.TCPMIG, "receive", "--unit-hook", f"{self.command} {target}"]
        options = ["--unit-hook", f"{self.command} {source}", "--remote-command", shlex.join(receive)]
        return tcpmig.migrate(self._hosts.source, pid, self._hosts.target, options=options)

    @property
    def calls(self) -> list[dict[str, dict[str, object]]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    @property
    def points(self) -> list[tuple[object, object]]:
        return [(call["said"]["role"], call["said"]["hook"]) for call in self.calls]


def test_hooks_are_called_on_both_hosts(hosts: ThreeHosts, process: HostProcess, service: str, tmp_path: Path) -> None:
    hooks = Hooks(hosts, tmp_path)
    summary = hooks.migrate(process.pid)
    assert hosts.target.state(process.pid) == "S"
    assert sorted(hooks.points) == [
        ("source", "before-stop"),
        ("source", "committed"),
        ("target", "before-stop"),
        ("target", "committed"),
    ]
    assert hooks.points[:2] == [("source", "before-stop"), ("target", "before-stop")]
    for call in hooks.calls:
        said, environment = call["said"], call["environment"]
        assert said["migration"] == environment["TCPMIG_MIGRATION"] == summary["migration"]
        assert said["pids"] == [process.pid]
        assert environment["TCPMIG_PIDS"] == str(process.pid)
        assert (environment["TCPMIG_HOOK"], environment["TCPMIG_ROLE"]) == (said["hook"], said["role"])
        (unit,) = said["units"]  # type: ignore[misc]
        assert (unit["name"], unit["pids"]) == (service, [process.pid])  # type: ignore[index]
        assert environment["TCPMIG_UNITS"] == service
        after = said["hook"] == "committed"
        assert said["target_pids"] == ([process.pid] if after else [])
    hosts.target.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_failing_hook_ends_the_move_before_the_stop(
    hosts: ThreeHosts, process: HostProcess, tmp_path: Path, side: str
) -> None:
    hooks = Hooks(hosts, tmp_path)
    with pytest.raises(MigrationFailed) as failed:
        hooks.migrate(process.pid, **{side: "before-stop"})
    assert failed.value.status == 3
    assert failed.value.summary["code"] == "TM-0711"
    assert "no, not now" in failed.value.summary["message"]
    assert hosts.source.state(process.pid) == "S"
    assert process.pid not in hosts.target.processes()
    begun = ["source", "target"] if side == "target" else ["source"]
    assert hooks.points[: len(begun)] == [(role, "before-stop") for role in begun]
    assert sorted(hooks.points[len(begun) :]) == [(role, "aborted") for role in begun]


def test_a_failure_after_the_stop_calls_the_hooks_again(
    hosts: ThreeHosts, process: HostProcess, tmp_path: Path
) -> None:
    hooks = Hooks(hosts, tmp_path)
    # when its hook is called, the target has checked that the number is free
    thief = f"import os; open('/proc/sys/kernel/ns_last_pid', 'w').write('{process.pid - 1}')\n"
    thief += "if os.fork() == 0:\n os.setsid(); os.execlp('sleep', 'sleep', '1000')\n"
    (tmp_path / "hook.py").write_text(HOOK + "if (said['role'], said['hook']) == ('target', 'before-stop'):\n ")
    with (tmp_path / "hook.py").open("a") as file:
        file.write(f"exec({thief!r})\n")
    with pytest.raises(MigrationFailed) as failed:
        hooks.migrate(process.pid)
    assert failed.value.status == 1
    assert hosts.source.state(process.pid) == "S"
    assert hosts.target.processes()[process.pid] == "sleep"
    hosts.target.kill(process.pid, signal.SIGKILL)
    assert sorted(hooks.points[2:]) == [("source", "aborted"), ("target", "aborted")]


def test_a_checkpoint_calls_its_hook_unless_the_processes_run_on(
    hosts: ThreeHosts, process: HostProcess, tmp_path: Path
) -> None:
    hooks, image = Hooks(hosts, tmp_path), tmp_path / "image"
    run = ["checkpoint", process.pid, "-o", image, "--unit-hook"]
    assert tcpmig.tcpmig(hosts.source, *run, hooks.command, "-R")[0] == 0
    assert hooks.points == []
    status, answer, _ = tcpmig.tcpmig(hosts.source, *run, f"{hooks.command} before-stop")
    assert (status, answer["code"]) == (3, "TM-0711")
    assert hooks.points == [("source", "before-stop"), ("source", "aborted")]
    assert hosts.source.state(process.pid) == "S"
    assert tcpmig.tcpmig(hosts.source, *run, hooks.command)[0] == 0
    assert hooks.points[2:] == [("source", "before-stop"), ("source", "committed")]
    assert process.pid not in hosts.source.processes()


@pytest.mark.parametrize("same", [False, True], ids=["another group", "a group of the same name"])
def test_what_moved_outlives_the_session_and_the_cgroup_that_brought_it(
    hosts: ThreeHosts, process: HostProcess, tmp_path: Path, same: bool
) -> None:
    pid, path = process.pid, f"tcpmigtest{os.getpid()}.slice/session-7.scope"
    with group(path) as folders:
        joining = "".join(f"echo 0 >{folder}/cgroup.procs\n" for folder in folders)
        receive = shlex.join([*tcpmig.TCPMIG, "receive"])
        script = tmp_path / "login"
        # as a login does: a group, a session, and something that goes on running in both
        script.write_text(f"#!/bin/sh\n{joining}sleep 2000 >/dev/null 2>&1 <&1 &\n{receive}\n")
        script.chmod(0o755)
        if same:
            for folder in folders:
                (folder / "cgroup.procs").write_text(str(process.outer_pid))
        before = hosts.source.sh(f"ps -o pgid=,sid= -p {pid}").split()
        tcpmig.migrate(hosts.source, pid, hosts.target, options=["--remote-command", str(script)])
        (sleeper,) = [p for p, name in hosts.target.processes().items() if name == "sleep" and p != pid]
        session = hosts.target.sh(f"ps -o sid= -p {sleeper}").strip()
        for folder in folders:
            # the login ends: all in its group, then all in its session
            for member in (folder / "cgroup.procs").read_text().split():
                os.kill(int(member), signal.SIGKILL)
        hosts.target.run(["pkill", "-KILL", "-s", session], check=False)
        hosts.target.wait_until_gone(sleeper)
        assert hosts.target.state(pid) == "S"
        assert hosts.target.sh(f"ps -o ppid=,pgid=,sid= -p {pid}").split() == ["1", *before]
        assert session not in before
        groups = hosts.target.sh(f"cat /proc/{pid}/cgroup")
        assert "session-7.scope" not in groups, groups
        # and it can be ended as any process
        hosts.target.kill(pid, signal.SIGTERM)
        hosts.target.wait_until_gone(pid)
        deadline = time.monotonic() + 5
        while any((folder / "cgroup.procs").read_text() for folder in folders):
            assert time.monotonic() < deadline
            time.sleep(0.01)
