"""`tcpmig inspect` and `tcpmig verify` on whole, damaged and foreign files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from checkpoint.image.format import Kind, PageRun, Space
from checkpoint.image.writer import ImageFile
from cli.main import tcpmig
from tcpstate.errors import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    pids: tuple[int, ...]
    name: str


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCPMIG_STATE_DIR", str(tmp_path / "state"))
    path = tmp_path / "image"
    with ImageFile(path) as file:
        file.record(Kind.TREE, Tree(pids=(4711, 4712), name="redis"))
        file.pages([PageRun(space=Space.MEMORY, id=4711, runs=((0x1000, 4096),), data=memoryview(bytes(4096)))])
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(tcpmig, [str(a) for a in arguments])


def test_verify_says_that_an_image_is_whole(image: Path) -> None:
    result = run("verify", image, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["outcome"], found["frames"], found["size"]) == ("done", 3, image.stat().st_size)
    assert len(bytes.fromhex(found["root"])) >= 16
    assert run("verify", image).stdout.startswith(f"{image}: whole, ")


def test_inspect_shows_all_or_a_section(image: Path) -> None:
    whole = json.loads(run("inspect", image, "--json").stdout)
    part = json.loads(run("inspect", image, "processes", "--json").stdout)
    assert whole["processes"][0]["pids"] == [4711, 4712]
    assert part == {"outcome": "done", "processes": whole["processes"]}


def test_inspect_speaks_to_people_too(image: Path) -> None:
    assert run("inspect", image, "processes").stdout == "processes:\n  - pids: [4711, 4712]\n    name: redis\n"
    assert "memory:" in run("inspect", image).stdout


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_flipped_byte_is_refused(image: Path, command: str) -> None:
    whole = image.read_bytes()
    # one byte in each part of the file; the image's own tests flip every single one
    for place in range(0, len(whole), 97):
        image.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        result = run(command, image, "--json")
        assert result.exit_code == Outcome.REFUSED, f"byte {place}"
        assert json.loads(result.stdout)["code"].startswith("TM-04")


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("length", [0, 1, 30, 4000])
def test_a_truncated_image_is_refused(image: Path, command: str, length: int) -> None:
    image.write_bytes(image.read_bytes()[:length])
    result = run(command, image)
    assert result.exit_code == Outcome.REFUSED
    assert result.stderr.startswith("TM-04")
    assert result.stdout == ""


@pytest.mark.parametrize("path", ["/nonexistent/image", "/", "/dev/null", "/etc/hostname"])
def test_what_is_no_image_is_refused(image: Path, path: str) -> None:
    result = run("verify", path)
    assert result.exit_code == Outcome.REFUSED
    assert result.stderr.startswith("TM-04")
    assert result.stderr.count("\n") == 1


def test_a_section_that_does_not_exist_is_a_usage_mistake(image: Path) -> None:
    assert run("inspect", image, "nothing").exit_code == Outcome.USAGE
