"""``tcpmig restore``: the processes of an image run again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO

import click

from cli.command import command
from cli.errors import PidFileNotWritten
from cli.fields import fields
from cli.filepolicy import external as with_external
from cli.filepolicy import file_places, places_of, require
from cli.session import Result, Session
from migrate.handover import DEFAULT_REMOTE_COMMAND, Origin
from migrate.snapshot import restore as build
from migrate.takeover import AddressPolicy
from migrate.transport import DEFAULT_RSH

__all__ = ["restore"]


@command("restore")
@click.argument("file", type=click.Path())
@click.option("--no-address", is_flag=True, help="Leave the addresses alone: they are local anyway, or not needed.")
@click.option("--pid-file", metavar="FILE", type=click.Path(), help="Write the root's PID there.")
@click.option("--from", "origin", metavar="HOST", help="The host that holds the connections: it gives them up first.")
@click.option(
    "--rsh", metavar="CMD", default=DEFAULT_RSH, help=f"With --from: the remote shell.  [default: {DEFAULT_RSH}]"
)
@click.option(
    "--remote-command",
    metavar="CMD",
    default=DEFAULT_REMOTE_COMMAND,
    help=f"With --from: what it runs on HOST.  [default: {DEFAULT_REMOTE_COMMAND}]",
)
@click.option(
    "--address-policy",
    type=click.Choice([policy.value for policy in AddressPolicy]),
    default=AddressPolicy.REFUSE.value,
    help="With --from: what if others there use such an address.  [default: refuse]",
)
@click.option(
    "--lazy", is_flag=True, help="Let them run at once: memory comes when it is needed, and in the background."
)
@click.option("--new-pid-namespace", is_flag=True, help="Make a PID namespace for them: their PIDs may be in use here.")
@click.option("--foreground", is_flag=True, help="Stay as the parent, and pass on the exit status.")
@file_places
@with_external
def restore(
    session: Session,
    file: str,
    no_address: bool,
    pid_file: str | None,
    origin: str | None,
    rsh: str,
    remote_command: str,
    address_policy: str,
    lazy: bool,
    new_pid_namespace: bool,
    foreground: bool,
    path_map: tuple[str, ...],
    overwrite: bool,
    map_dev: tuple[str, ...],
    veth: tuple[str, ...],
    external: tuple[str, ...],
) -> Result | None:
    """Let the processes of the image FILE run again, here, with their PIDs, connections and addresses.

    The image is verified whole before anything is built; with --lazy, but for memory that comes later. Connections that
    this host holds are taken back; those that another host holds it gives up, with the addresses, if --from names it.
    Prints the root's PID.
    """
    if origin is None:
        of_there = {"--rsh": rsh != DEFAULT_RSH, "--remote-command": remote_command != DEFAULT_REMOTE_COMMAND}
        require("--from HOST", of_there | {"--address-policy": address_policy != AddressPolicy.REFUSE.value})
    places = places_of(path_map=path_map, overwrite=overwrite, map_dev=map_dev, veth=veth, external=external)
    with contextlib.ExitStack() as ends:
        out = ends.enter_context(_pid_file(pid_file))
        there = None
        if origin is not None:
            shared = AddressPolicy(address_policy) is AddressPolicy.ALLOW
            there = ends.enter_context(Origin(origin, rsh=rsh, remote_command=remote_command, shared=shared))
        summary = build(
            file,
            take_addresses=not no_address,
            origin=there,
            files=places,
            lazy=lazy,
            new_pids=new_pid_namespace,
        )
        if out is not None:
            out.write(f"{summary.pid}\n")
    data = fields(summary)
    body: list[str] = [str(summary.pid)]
    if not foreground:
        return Result(data=data, body=body)
    session.emit(Result(data=data, body=body))
    # the first process of their own namespace ends with the root's status
    _, status = os.waitpid(summary.init or summary.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # as a shell says it
    raise SystemExit(code if code >= 0 else 128 - code)


@contextlib.contextmanager
def _pid_file(path: str | None) -> Iterator[TextIO | None]:
    """The file, open before anything is built: that it cannot be written must not come out when the processes run."""
    if path is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            out = stack.enter_context(open(path, "w", encoding="ascii"))
        except OSError as error:
            raise PidFileNotWritten(f"the PID file cannot be written: {error.strerror}", object=path) from error
        yield out
