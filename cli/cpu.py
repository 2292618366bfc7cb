"""What the user says of the CPU that the processes need."""

from __future__ import annotations

from collections.abc import Iterable

import click

__all__ = ["cpu_unused", "patterns"]

cpu_unused = click.option(
    "--cpu-unused",
    metavar="FEATURE,...",
    multiple=True,
    help="CPU features of this host that the processes do without, as in /proc/cpuinfo; * and ? match. HOST may lack "
    "them. May be repeated.",
)


def patterns(given: Iterable[str]) -> tuple[str, ...]:
    """The words of all ``--cpu-unused``."""
    return tuple(word for text in given for word in text.split(",") if word)
