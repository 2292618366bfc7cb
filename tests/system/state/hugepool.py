"""So many huge pages may be taken out of free memory while somebody runs cases: a setting of the whole machine.

Whoever comes first notes what it was, whoever leaves last puts it back.  A process of its own does that when its input
ends, so that it is done as well if the tests are killed.

python -S hugepool.py: until the end of its input
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["Pool", "enter", "leave"]

SETTING = Path("/proc/sys/vm/nr_overcommit_hugepages")
PAGES = 64


def _open(folder: Path, name: str) -> IO[str]:
    return os.fdopen(os.open(folder / f"tcpmig-hugepool-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")


def enter(setting: Path, folder: Path) -> IO[str]:
    """Raise the setting; what to give to :func:`leave`."""
    with _open(folder, "before") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        users = _open(folder, "users")
        fcntl.flock(users, fcntl.LOCK_SH)
        # what is noted already is of those who are here, or were all killed
        if not before.read():
            before.write(setting.read_text())
            before.flush()
        setting.write_text(str(PAGES))
    return users


def leave(users: IO[str], setting: Path, folder: Path) -> None:
    """Put the setting back, if nobody else needs it."""
    with users, _open(folder, "before") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        setting.write_text(before.read())
        before.seek(0)
        before.truncate()


class Pool:
    """The setting is raised until :meth:`close`, or the death of this process."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", __file__]
        self._keeper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        assert self._keeper.stdout is not None
        self._keeper.stdout.read(1)

    def close(self) -> None:
        self._keeper.communicate()


def main() -> None:
    folder = Path(tempfile.gettempdir())
    users = enter(SETTING, folder)
    os.write(1, b"r")
    sys.stdin.read()
    leave(users, SETTING, folder)


if __name__ == "__main__":
    main()
