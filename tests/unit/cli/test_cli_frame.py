"""What every command has: its place in the list, JSON, exit statuses, errors in one line, a log."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import cli.commands
from cli import main
from cli.command import command
from cli.log import KEPT
from cli.session import Result as Answer
from cli.session import Session, Table
from tcpstate.errors import NoSuchConnection, Outcome

ROOT = Path(__file__).resolve().parent.parent.parent.parent

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCPMIG_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main.tcpmig, arguments)


@pytest.fixture
def run_as_command() -> Iterator[Run]:
    """Run a function as `tcpmig probe`."""
    group = main.LazyGroup("tcpmig")

    def run(function: Callable[..., Answer | None], *arguments: str) -> Result:
        made = command("probe")(function)
        group.get_command = lambda ctx, name: made  # type: ignore[method-assign]
        return CliRunner().invoke(group, ["probe", *arguments])

    yield run
    # nothing of a run stays behind in the loggers
    assert not logging.getLogger("cli").handlers


def one_object(text: str) -> dict[str, object]:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


# -- the list of commands


def test_the_list_has_the_modules_that_exist() -> None:
    modules = {path.stem for path in Path(cli.commands.__path__[0]).glob("*.py")} - {"__init__"}
    assert modules == set(main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_of_the_list_is_one(name: str) -> None:
    found = main.LazyGroup().get_command(click.Context(main.tcpmig), name)
    assert found is not None
    assert found.name == name
    assert found.help


def test_help_lists_exactly_the_commands(run: Run) -> None:
    result = run("--help")
    listed = result.stdout.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "] == list(main.COMMANDS)
    assert result.exit_code == 0


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: tcpmig {name}")


def test_the_reference_tells_of_every_command() -> None:
    reference = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    told = [line.split("`")[1].split()[1] for line in reference.splitlines() if line.startswith("## `tcpmig ")]
    assert told == list(main.COMMANDS)


def options_of(name: str) -> set[str]:
    found = main.LazyGroup().get_command(click.Context(main.tcpmig), name)
    assert found is not None
    return {option for p in found.params if isinstance(p, click.Option) and not p.hidden for option in p.opts}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_reference_tells_of_every_option(name: str) -> None:
    reference = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    section = reference.split(f"## `tcpmig {name}", 1)[1].split("\n## ")[0]
    wanted = options_of(name) - {"--json", "--verbose", "-v"}
    if "All other options are those of `migrate`." in section:
        wanted -= options_of("migrate")
    assert not {option for option in wanted if f"`{option}" not in section and f"/{option}" not in section}


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; sys.argv = ['tcpmig', '--help']; from cli.main import main\ntry: main()\nfinally: "
    script += "print('\\n'.join(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(result.stderr.split())
    heavy = {"pyroute2", "rich", "cryptography", "msgpack", "psutil", "zstandard", "logging", "json", "asyncio"}
    assert not loaded & heavy
    ours = {name for name in loaded if name.split(".")[0] in {"tcpstate", "checkpoint", "migrate"}}
    assert {name for name in ours if not name.startswith("tcpstate.errors.")} == {
        "tcpstate",
        "tcpstate.errors",
        "tcpstate.slotted",
        "tcpstate.version",
    }
    assert not {name for name in loaded if name.startswith("cli.commands")}


# -- usage


@pytest.mark.parametrize(
    "arguments", [("nosuch",), ("explain", "--nosuch"), ("explain", "TM-0100", "more"), ("--nosuch",)]
)
def test_a_usage_mistake_exits_2(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == Outcome.USAGE
    assert result.stdout == ""
    assert result.stderr.startswith("TM-0110: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("check", "--map", "/a=/b"), "--map wants --to HOST"),
        (("check", "1", "--map-dev", "a=b", "--overwrite"), "--map-dev and --overwrite want --to HOST"),
        (("check", "1", "--address", "none"), "--address wants --to HOST"),
        (("check", "1", "--to", "there", "--overwrite"), "--overwrite wants --ship"),
        (("migrate", "1", "there", "--overwrite"), "--overwrite wants --ship"),
        (("restore", "file", "--rsh", "rsh"), "--rsh wants --from HOST"),
    ],
)
def test_an_option_without_what_it_is_about_is_a_usage_mistake(
    run: Run, arguments: tuple[str, ...], missing: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == Outcome.USAGE
    assert result.stderr.startswith(f"TM-0110: {missing} as well")


def test_a_usage_mistake_is_told_in_json(run: Run) -> None:
    result = run("explain", "--json", "--nosuch")
    assert result.exit_code == Outcome.USAGE
    found = one_object(result.stdout)
    assert (found["outcome"], found["code"]) == ("usage", "TM-0110")
    assert "explain --help" in str(found["fix"])


# -- results


def test_a_result_is_one_json_object(run_as_command: Run) -> None:
    data = {"name": "a\u2028b\nc", "bytes": b"\xff\x00", "none": None}
    result = run_as_command(lambda session: Answer(data=data), "--json")
    assert one_object(result.stdout) == {"outcome": "done", "name": "a\u2028b\nc", "bytes": "ff00", "none": None}
    assert result.exit_code == 0


def test_the_outcome_is_the_exit_status(run_as_command: Run) -> None:
    result = run_as_command(lambda session: Answer(data={}, outcome=Outcome.PARTIAL), "--json")
    assert one_object(result.stdout)["outcome"] == "partial"
    assert result.exit_code == 4


def test_a_table_is_aligned_and_harmless(run_as_command: Run) -> None:
    table = Table(columns=["pid", "name"], rows=[["1", "init"], ["4711", "evil\x1b[2J\nname"]])
    result = run_as_command(lambda session: Answer(data={}, body=[table]))
    assert result.stdout == "pid   name\n1     init\n4711  evil\\x1b[2J\\x0aname\n"


# -- failures


def refuse(session: Session) -> Answer | None:
    raise NoSuchConnection("no connection\nlike that", object="tcp:a\x1b")


def test_an_error_is_one_line_on_stderr(run_as_command: Run) -> None:
    result = run_as_command(refuse)
    assert result.exit_code == Outcome.REFUSED
    assert result.stdout == ""
    assert result.stderr == f"TM-0202: no connection like that (tcp:a\\x1b). {NoSuchConnection.fix}\n"


def test_an_error_is_told_in_json(run_as_command: Run) -> None:
    result = run_as_command(refuse, "--json")
    assert result.exit_code == Outcome.REFUSED
    assert one_object(result.stdout) == {
        "outcome": "refused",
        "code": "TM-0202",
        "message": "no connection\nlike that",
        "object": "tcp:a\x1b",
        "fix": NoSuchConnection.fix,
    }


def test_verbose_adds_why_and_where(run_as_command: Run) -> None:
    result = run_as_command(refuse, "-v")
    first, _, rest = result.stderr[result.stderr.index("TM-0202") :].partition("\n")
    assert first.startswith("TM-0202: ")
    assert "hidden from this PID namespace" in rest
    assert "Traceback" in rest


def test_the_unexpected_names_the_log(run_as_command: Run, state_dir: Path) -> None:
    def broken(session: Session) -> Answer | None:
        raise ZeroDivisionError("oops")

    result = run_as_command(broken, "--json")
    found = one_object(result.stdout)
    [log] = (state_dir / "log").iterdir()
    assert result.exit_code == Outcome.FAILED
    assert (found["code"], found["outcome"]) == ("TM-0100", "failed")
    assert found["message"] == "unexpected ZeroDivisionError: oops"
    assert str(log) in str(found["fix"])
    assert "Traceback" in log.read_text()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_in_good_order(
    run_as_command: Run, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    undone = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # so a shell begins what it does not wait for, and so it stays: not for us
        signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))

    def waits(session: Session) -> Answer | None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            undone.append(True)
        return None

    result = run_as_command(waits)
    assert undone
    assert result.exit_code == Outcome.FAILED
    assert result.stderr.startswith("TM-0111: ended by ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_reader_that_left_is_no_error() -> None:
    script = f"{sys.executable} -m cli explain | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_command_that_cannot_be_imported_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.COMMANDS, "broken", "There is no such module.")
    result = run("broken", "--json")
    assert result.exit_code == Outcome.FAILED
    assert one_object(result.stdout)["code"] == "TM-0100"


# -- progress and log


def speaks(session: Session) -> Answer | None:
    log = logging.getLogger("checkpoint.dump")
    log.debug("a detail")
    log.info("a step")
    log.warning("a warning")
    return Answer(data={}, body=["the result"])


@pytest.mark.parametrize(
    ("option", "stderr"),
    [
        ((), "a step\nwarning: a warning\n"),
        (("--json",), "warning: a warning\n"),
        (("-v",), "a detail\na step\nwarning: a warning\n"),
    ],
)
def test_progress_goes_to_stderr(run_as_command: Run, option: tuple[str, ...], stderr: str) -> None:
    result = run_as_command(speaks, *option)
    assert result.stderr.split("command line: ")[-1].endswith(stderr)
    assert "a step" not in result.stdout


def test_every_run_leaves_a_private_log(run_as_command: Run, state_dir: Path) -> None:
    run_as_command(speaks)
    [log] = (state_dir / "log").iterdir()
    assert "-probe-" in log.name
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    text = log.read_text()
    assert "DEBUG   checkpoint.dump: a detail" in text
    assert "WARNING checkpoint.dump: a warning" in text


def test_old_logs_go(run_as_command: Run, state_dir: Path) -> None:
    directory = state_dir / "log"
    directory.mkdir(parents=True)
    for number in range(KEPT):
        (directory / f"2000010{number:04}-probe-1.log").touch()
    run_as_command(speaks)
    names = sorted(path.name for path in directory.iterdir())
    assert len(names) == KEPT
    assert "20000100000-probe-1.log" not in names


def test_no_place_for_a_log_is_said(
    run_as_command: Run, state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir.write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    result = run_as_command(speaks)
    assert list((tmp_path / "home/tcpmig/log").iterdir()), "the second choice is taken"
    assert "no log" not in result.stderr
    monkeypatch.setenv("XDG_STATE_HOME", str(state_dir))
    result = run_as_command(speaks)
    assert result.exit_code == 0
    assert result.stderr.startswith("tcpmig: no log is kept (")
