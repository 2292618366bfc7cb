"""Numbers out of the kernel's BTF, by name, remembered from run to run.

Parsing BTF takes some 50 ms; the few hundred numbers that our programs want are the same as long as the kernel is.  So
they are kept in a file, named for the kernel's build.  What lies there is not believed blindly: it must be a plain file
of ours that nobody else can write, of the right form, for this very build; else BTF is parsed again.  Even a wrong
number could only make the kernel refuse a program: the verifier checks every access by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tcpstate.kernel.bpf.btf import VMLINUX, BadBtf, Btf, Kind, Place

__all__ = ["Layout", "cache_directory", "kernel_build", "layout"]

_log = logging.getLogger(__name__)

_NOTES: Final = Path("/sys/kernel/notes")
_DEFAULT_STATE: Final = "/var/lib/tcpmig"
_SIZE_MAX: Final = 1 << 20
_NUMBER_MAX: Final = 1 << 31
_Ask = Callable[[Btf], Iterable[int]]


def cache_directory() -> Path:
    """Where the numbers lie: below TCPMIG_STATE_DIR, else /var/lib/tcpmig."""
    return Path(os.environ.get("TCPMIG_STATE_DIR") or _DEFAULT_STATE) / "cache"


def kernel_build() -> str:
    """What tells this kernel's build from every other: a digest of its build id (in its notes), its version and the
    size of its BTF."""
    parts = [os.uname().release.encode(), os.uname().version.encode()]
    with contextlib.suppress(OSError):
        parts.append(_NOTES.read_bytes())
    with contextlib.suppress(OSError):
        parts.append(str(VMLINUX.stat().st_size).encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


class Layout:
    """Offsets, sizes and ids of this kernel, each asked for by name.

    build      of which kernel (:func:`kernel_build`)
    directory  where they are remembered; None: nowhere
    """

    def __init__(self, build: str, directory: Path | None) -> None:
        self._build = build
        self._file = None if directory is None else directory / f"btf-{build}.json"
        self._known: dict[str, tuple[int, ...]] = self._read()
        self._new = False
        self._btf: Btf | None = None

    def place(self, structure: str, path: str) -> Place:
        """Where a member lies. BadBtf if this kernel has none; OSError if it does not tell."""
        return Place(*self._number(f"place {structure} {path}", 4, lambda b: b.place(structure, path)))

    def offset(self, structure: str, path: str) -> int:
        """Bytes from the start of the structure. BadBtf, OSError."""
        return self.place(structure, path).offset

    def size(self, structure: str) -> int:
        """Bytes of a structure. BadBtf, OSError."""
        return self._number(f"size {structure}", 1, lambda b: (b.size(structure),))[0]

    def id(self, kind: Kind, name: str) -> int:
        """BTF id of a structure or function. BadBtf, OSError."""
        return self._number(f"id {kind.name} {name}", 1, lambda b: (b.id(kind, name),))[0]

    def index(self, structure: str, member: str) -> int:
        """The place of a member among the others. BadBtf, OSError."""
        return self._number(f"index {structure} {member}", 1, lambda b: (b.index(structure, member),))[0]

    def _number(self, question: str, count: int, ask: _Ask) -> tuple[int, ...]:
        answer = self._known.get(question)
        if answer is None or len(answer) not in (0, count):
            if self._btf is None:
                self._btf = Btf.of_kernel()
            try:
                answer = tuple(ask(self._btf))
            except BadBtf:
                # remembered as well: an older kernel is asked the same at every run
                answer = ()
            self._known[question] = answer
            self._new = True
        if not answer:
            raise BadBtf(f"this kernel's BTF has no {question.partition(' ')[2]}")
        return answer

    def _read(self) -> dict[str, tuple[int, ...]]:
        if self._file is None:
            return {}
        try:
            fd = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            _log.debug("no remembered BTF: %s", error)
            return {}
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                _log.warning("%s is not a file of ours alone: not read", self._file)
                return {}
            return _checked(file.read(_SIZE_MAX), self._build)

    def save(self) -> None:
        """Remember what was found out. That it cannot be is no error: the next run parses again."""
        if not self._new or self._file is None:
            return
        value = {"build": self._build, "numbers": {k: list(v) for k, v in sorted(self._known.items())}}
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".btf-")  # 0600
            try:
                with open(fd, "w", encoding="ascii") as file:
                    json.dump(value, file)
                os.rename(temporary, self._file)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            _log.debug("BTF is not remembered: %s", error)
            return
        self._new = False


def _checked(data: bytes, build: str) -> dict[str, tuple[int, ...]]:
    """What a file holds; nothing if it is not exactly of our form and of this build."""
    try:
        value = json.loads(data.decode("ascii"))
        if not isinstance(value, dict) or value.get("build") != build:
            return {}
        numbers = value["numbers"]
        known = {}
        for question, answer in numbers.items():
            if not isinstance(answer, list) or any(type(n) is not int or not 0 <= n < _NUMBER_MAX for n in answer):
                return {}
            known[question] = tuple(answer)
    except (ValueError, KeyError, AttributeError, RecursionError):
        # damaged: as if it were not there
        return {}
    return known


_current: dict[tuple[str, str], Layout] = {}


def layout() -> Layout:
    """Of the running kernel, one per process and cache directory."""
    key = kernel_build(), str(cache_directory())
    if key not in _current:
        _current[key] = Layout(key[0], cache_directory())
    return _current[key]
