"""What the user says of the rounds in which memory is copied."""

from __future__ import annotations

import click

from migrate.summary import MAX_DOWNTIME_MS

__all__ = ["max_downtime", "stop_and_copy"]

max_downtime = click.option(
    "--max-downtime",
    metavar="MS",
    type=click.FloatRange(0),
    default=MAX_DOWNTIME_MS,
    help=f"Copy memory in rounds until what is left for the stop takes no longer.  [default: {MAX_DOWNTIME_MS:g}]",
)

stop_and_copy = click.option(
    "--stop-and-copy", is_flag=True, help="No rounds: all memory is copied while the processes stand still."
)
