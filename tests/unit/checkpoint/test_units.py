"""systemd units by the paths of cgroups, by what `systemctl show` prints, by unit files; other supervisors by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import supervisors, units
from checkpoint.state.cgroup import Cgroup
from checkpoint.supervisors import parent_supervisor
from checkpoint.units import Unit, UnitName, parse_properties, parse_unit_files, unit_in, unit_of
from checkpoint.verdict import Status, refusals


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/", None),
        ("/system.slice/nginx.service", UnitName("nginx.service")),
        ("/system.slice/system-getty.slice/getty@tty1.service", UnitName("getty@tty1.service")),
        ("/system.slice/nginx.service/inner", UnitName("nginx.service")),
        ("/system.slice/_cgroup.service", UnitName("cgroup.service")),
        ("/user.slice/user-0.slice/session-3.scope", UnitName("session-3.scope")),
        ("/user.slice/user-1000.slice/user@1000.service", UnitName("user@1000.service")),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service", UnitName("web.service", 1000)),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", UnitName("init.scope", 1000)),
        ("/docker/0123", None),
        ("/process_api/0123/web.service", None),
    ],
)
def test_the_unit_in_a_path(path: str, unit: UnitName | None) -> None:
    assert unit_in(path) == unit


def test_the_named_hierarchy_of_version_1_comes_first() -> None:
    groups = [Cgroup("cpu", "/a.service"), Cgroup("", "/b.service"), Cgroup("name=systemd", "/c.service")]
    assert unit_of(groups) == UnitName("c.service")
    assert unit_of(groups[:2]) == UnitName("b.service")
    assert unit_of(groups[:1]) is None


@given(st.text())
def test_no_path_upsets_the_reader(path: str) -> None:
    found = unit_in(path)
    assert found is None or found.name in path


def test_properties() -> None:
    assert parse_properties("Restart=always\nMainPID=12\n\nnoise\nExecStart={ a=b }\n") == {
        "Restart": "always",
        "MainPID": "12",
        "ExecStart": "{ a=b }",
    }


def test_the_last_value_of_a_unit_file_counts_and_only_in_its_section() -> None:
    main = "[Unit]\nRestart=no\n[Service]\n# Restart=never\nExecStart=/bin/a \\\n Restart=b\nRestart = always\n"
    assert parse_unit_files([main])["Restart"] == "always"
    assert parse_unit_files([main, "[Service]\nRestart=no\n"])["Restart"] == "no"
    assert "Restart" not in parse_unit_files(["[Install]\nRestart=always\n"])


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def no_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path


def test_unit_files_and_drop_ins_in_their_order(no_systemd: Path) -> None:
    name = UnitName("web@1.service")
    assert units.look(name, root=no_systemd) == Unit(name=name)
    write(no_systemd, "usr/lib/systemd/system/web@.service", "[Service]\nRestart=always\n")
    assert units.look(name, root=no_systemd).restart == "always"
    write(no_systemd, "etc/systemd/system/web@.service.d/10-a.conf", "[Service]\nRestart=on-failure\n")
    assert units.look(name, root=no_systemd).restart == "on-failure"
    write(no_systemd, "run/systemd/system/web@1.service.d/20-b.conf", "[Service]\nRestart=no\n")
    assert not units.look(name, root=no_systemd).restarts
    # the same name in /etc hides the one in /run
    write(no_systemd, "etc/systemd/system/web@1.service.d/20-b.conf", "[Service]\nRestart=on-abort\n")
    assert units.look(name, root=no_systemd).restart == "on-abort"
    write(no_systemd, "etc/systemd/system/web@.service", "[Service]\nExecStart=/bin/true\n")
    write(no_systemd, "etc/systemd/system/web@1.service.d/20-b.conf", "")
    write(no_systemd, "etc/systemd/system/web@.service.d/10-a.conf", "")
    assert units.look(name, root=no_systemd).restart == "no", "systemd's default"


@pytest.mark.parametrize(
    ("unit", "main", "code"),
    [
        ({"restart": "always", "main": 7, "asked": True}, True, "TM-0384"),
        ({"restart": "always", "main": 0, "asked": True}, False, "TM-0384"),
        ({"restart": "on-failure"}, False, "TM-0384"),
        ({"restart": "no", "main": 7, "asked": True}, True, "TM-0385"),
        ({"restart": ""}, True, "TM-0385"),
        ({"restart": "always", "main": 8, "asked": True}, False, ""),
        ({"restart": "no", "main": 8, "asked": True}, False, ""),
    ],
)
def test_what_a_unit_means(unit: dict[str, object], main: bool, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = supervisors.Supervised(unit=Unit(name=UnitName("web.service"), **unit), pids=(7,), main=main)  # type: ignore[arg-type]
    monkeypatch.setattr(supervisors, "supervised", lambda members: [one])
    (verdict,) = supervisors.verdicts([], [7])
    assert (verdict.code, verdict.subject) == (code, "pid 7")
    assert verdict.status is (Status.REFUSE if code else Status.WARN)
    assert "web.service" in verdict.text
    hooked = supervisors.verdicts([], [7], hook=True)
    assert not refusals(hooked)
    assert "web.service" in hooked[0].text


@pytest.mark.parametrize(
    ("comm", "arguments", "what"),
    [
        ("supervisord", [], "supervisor"),
        ("python3", ["/usr/bin/python3", "/usr/bin/supervisord", "-n"], "supervisor"),
        ("runsv", ["runsv", "web"], "runit"),
        ("s6-supervise", [], "s6"),
        ("supervise-daemo", [], "OpenRC"),
        ("containerd-shim", [], "containerd"),
        ("PM2 v5.3.0: God", [], "PM2"),
        ("bash", ["-bash"], ""),
        ("runsvdir-like", [], ""),
        ("python3", ["python3", "serve.py", "supervisord"], ""),
    ],
)
def test_supervisors_by_name(comm: str, arguments: list[str], what: str) -> None:
    assert parent_supervisor(comm, arguments) == what
