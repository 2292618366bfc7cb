"""systemd units: which one a process belongs to, and what systemd will do when the process ends.

The unit is read from the path of the process's cgroup: systemd gives every service and scope a group of its own.  What
it would do is asked of systemd itself (``systemctl show``), and read from the unit files where it does not answer, as
in a container or a rescue shell.  The first half of this module takes text and returns values.

Source: systemd.unit(5), systemd.service(5), systemctl(1); systemd src/basic/cgroup-util.c cg_path_get_unit.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from checkpoint.state.cgroup import Cgroup
from tcpstate.slotted import dataclass

__all__ = ["Unit", "UnitName", "look", "parse_properties", "parse_unit_files", "unit_in", "unit_of"]

_log = logging.getLogger(__name__)

_USER_MANAGER: Final = re.compile(r"user@(\d+)\.service")
_PROPERTIES: Final = ("LoadState", "MainPID", "Restart", "Type")
_ASK_TIMEOUT: Final = 5.0
#: where unit files are, the first of a name wins (systemd.unit(5), "Unit File Load Path"); %s: system or user
_FILES: Final = (
    "/etc/systemd/%s.control",
    "/run/systemd/%s.control",
    "/run/systemd/transient",
    "/etc/systemd/%s",
    "/run/systemd/%s",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/%s",
    "/usr/lib/systemd/%s",
    "/lib/systemd/%s",
)


@dataclass(frozen=True, slots=True)
class UnitName:
    """A unit and its manager.

    name  ``nginx.service``, ``session-3.scope``
    user  number of the user whose manager has it; None: the system's
    """

    name: str
    user: int | None = None

    @property
    def is_service(self) -> bool:
        """Services are started, and started again, by systemd; scopes hold what others have started."""
        return self.name.endswith(".service")

    def __str__(self) -> str:
        return self.name if self.user is None else f"{self.name} of user {self.user}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is known of a unit.

    main     its main process; 0: it has none, or systemd was not asked
    restart  ``Restart=``; empty: not known
    asked    whether systemd itself told this
    """

    name: UnitName
    main: int = 0
    restart: str = ""
    asked: bool = False

    @property
    def restarts(self) -> bool:
        """Whether systemd starts it again in some case."""
        return self.restart not in ("", "no")


def unit_in(path: str) -> UnitName | None:
    """The unit in the path of a cgroup of systemd's hierarchy; None if it has none.

    The first part that is not a slice is the unit; below a user's manager its own units follow.
    """
    user: int | None = None
    found: UnitName | None = None
    for part in path.split("/"):
        # names that would look like files of the kernel's begin with an underscore (cg_escape)
        name = part.removeprefix("_")
        if not name or name.endswith(".slice"):
            continue
        if user is None and (manager := _USER_MANAGER.fullmatch(name)):
            user, found = int(manager[1]), UnitName(name)
            continue
        if name.endswith((".service", ".scope")):
            return UnitName(name, user)
        # a group that somebody made inside: it belongs to what is above
        return found
    return found


def unit_of(groups: Iterable[Cgroup]) -> UnitName | None:
    """The unit of a process that is in these cgroups."""
    # systemd's own: version 1 with a name, or version 2 (the only one, or beside those of version 1)
    paths = {group.hierarchy: group.path for group in groups}
    for hierarchy in ("name=systemd", ""):
        if hierarchy in paths and (found := unit_in(paths[hierarchy])) is not None:
            return found
    return None


def parse_properties(text: str) -> dict[str, str]:
    """The lines ``Name=value`` of `systemctl show`."""
    lines = (line.partition("=") for line in text.splitlines())
    return {name: value for name, equals, value in lines if equals}


def parse_unit_files(texts: Sequence[str]) -> dict[str, str]:
    """The last value of every key of the section [Service] in a unit file and its drop-ins, in this order."""
    found: dict[str, str] = {}
    for text in texts:
        section = ""
        # a backslash at its end makes one line of two
        for line in text.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("[") and line.endswith("]"):
                section = line
            elif section == "[Service]" and line[:1] not in ("", "#", ";"):
                key, _, value = line.partition("=")
                found[key.strip()] = value.strip()
    return found


def look(name: UnitName, *, root: Path = Path("/")) -> Unit:
    """What systemd, or else the unit's files below ``root``, tell of a unit."""
    told = _ask(name)
    if told is not None:
        main = told.get("MainPID", "0")
        return Unit(name=name, main=int(main) if main.isdigit() else 0, restart=told.get("Restart", ""), asked=True)
    files = _unit_files(name, root)
    if not files:
        return Unit(name=name)
    # what is not written has systemd's default
    return Unit(name=name, restart=parse_unit_files(files).get("Restart") or "no")


def _ask(name: UnitName) -> Mapping[str, str] | None:
    """What `systemctl show` says; None if there is no systemd that knows the unit."""
    command = ["systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", name.name]
    environment = dict(os.environ, LC_ALL="C", SYSTEMD_PAGER="")
    if name.user is not None:
        command.insert(1, "--user")
        environment |= {"XDG_RUNTIME_DIR": f"/run/user/{name.user}"}
        environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ASK_TIMEOUT, check=False,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.debug("systemd does not tell of %s: %s", name, error)
        return None
    found = parse_properties(done.stdout)
    if done.returncode or found.get("LoadState", "not-found") == "not-found":
        _log.debug("systemd does not know %s: %s", name, done.stderr.strip() or done.returncode)
        return None
    return found


def _unit_files(name: UnitName, root: Path) -> list[str]:
    """The unit's file and its drop-ins, as text; empty if there is no file."""
    stem, _, suffix = name.name.rpartition(".")
    template = f"{stem.partition('@')[0]}@.{suffix}" if "@" in stem else ""
    kind = "system" if name.user is None else "user"
    folders = [root / (place % kind if "%" in place else place).lstrip("/") for place in _FILES]
    names = list(filter(None, (name.name, template)))
    main = next((file for each in names for folder in folders if (file := folder / each).is_file()), None)
    if main is None:
        return []
    drop_ins: dict[str, Path] = {}
    # a drop-in of a folder that comes first hides those of the same name; all are read in the order of their names
    for each in (f"{suffix}.d", *(f"{n}.d" for n in reversed(names))):
        for folder in reversed(folders):
            drop_ins |= {file.name: file for file in sorted((folder / each).glob("*.conf"))}
    files = [main, *(drop_ins[key] for key in sorted(drop_ins))]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]
