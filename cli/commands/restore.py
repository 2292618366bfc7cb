"""``tcpmig restore``: the processes of an image run again."""

from __future__ import annotations

import os

import click

from cli.command import command
from cli.fields import fields
from cli.session import Result, Session
from migrate.snapshot import restore as build

__all__ = ["restore"]


@command("restore")
@click.argument("file", type=click.Path())
@click.option("--no-address", is_flag=True, help="Leave the addresses alone: they are local anyway, or not needed.")
@click.option("--pid-file", metavar="FILE", type=click.Path(), help="Write the root's PID there.")
@click.option("--foreground", is_flag=True, help="Stay as the parent, and pass on the exit status.")
def restore(session: Session, file: str, no_address: bool, pid_file: str | None, foreground: bool) -> Result | None:
    """Let the processes of the image FILE run again, here, with their PIDs, connections and addresses.

    The image is verified whole before anything is built. Prints the root's PID.
    """
    summary = build(file, take_addresses=not no_address)
    if pid_file is not None:
        with open(pid_file, "w", encoding="ascii") as out:
            out.write(f"{summary.pid}\n")
    data = fields(summary)
    body: list[str] = [str(summary.pid)]
    if not foreground:
        return Result(data=data, body=body)
    session.emit(Result(data=data, body=body))
    _, status = os.waitpid(summary.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # as a shell says it
    raise SystemExit(code if code >= 0 else 128 - code)
