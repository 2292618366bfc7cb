"""What a case of the suite is, and the table of them.

A case is one small program with one kind of state.  It is a generator function: up to its ``yield`` it sets the state
up, behind it the program looks, with its own eyes, whether everything is as it was; between the two it is checkpointed
and restored (three times; once in the sample that `make test` runs).  It runs in a process of its own, forked from
:mod:`tests.system.state.runner`.

    @case("files/pipe")
    def bytes_in_a_pipe(here):
        r, w = os.pipe()
        os.write(w, b"x")
        yield
        assert os.read(r, 9) == b"x"

Case modules import the standard library only: what they import is memory that is written and read in each cycle.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CASES", "Case", "Here", "case", "load", "load_all"]

Program = Callable[["Here"], Iterator[None]]


@dataclass(frozen=True, slots=True)
class Here:
    """Where a case runs.

    folder    an empty directory of its own
    programs  where the programs in C lie, compiled (tests/system/state/programs)
    control   path of the control file, and ``slot``: which part of it is this case's
    """

    folder: Path
    programs: Path
    control: Path
    slot: int

    def path(self, name: str) -> str:
        """A path in the folder."""
        return str(self.folder / name)

    def execute(self, program: str, *args: object) -> None:
        """Become a program in C, which sets up and verifies by itself (see programs/case.h)."""
        path = self.programs / program
        words = [str(path), str(self.control), str(self.slot), str(self.folder), *map(str, args)]
        os.execv(path, words)


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    name       module of tests/system/state/cases and function
    exercises  the modules without which it must fail, as tests/system/state/without.py calls them
    alone      it cannot share a process tree with other cases
    differs    regular expressions for lines of the comparison that rightly differ; each with its reason beside it
    external   what the user says of descriptors (--external)
    ship       names of files that travel along (--ship): the target has others in their place
    spaces     CLONE_NEW*: namespaces that its whole tree is in (tests/system/state/spaces.py); such a case is alone
    """

    name: str
    program: Program
    exercises: tuple[str, ...]
    alone: bool = False
    differs: tuple[str, ...] = ()
    external: tuple[str, ...] = ()
    ship: tuple[str, ...] = ()
    spaces: int = 0


CASES: dict[str, Case] = {}


def case(
    *exercises: str,
    alone: bool = False,
    differs: tuple[str, ...] = (),
    external: tuple[str, ...] = (),
    ship: tuple[str, ...] = (),
    spaces: int = 0,
) -> Callable[[Program], Program]:
    """Decorator: enter the function in the table."""

    def add(program: Program) -> Program:
        name = f"{program.__module__.rpartition('.')[2]}.{program.__name__}"
        CASES[name] = Case(name, program, exercises, alone or bool(spaces), differs, external, ship, spaces)
        return program

    return add


def load(name: str) -> Case:
    """The case of that name; only its module is imported."""
    importlib.import_module(f"tests.system.state.cases.{name.partition('.')[0]}")
    return CASES[name]


def load_all() -> dict[str, Case]:
    """The whole table."""
    folder = Path(__file__).parent / "cases"
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"tests.system.state.cases.{module.name}")
    return CASES
