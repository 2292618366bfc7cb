"""The options by which a user decides about files, interfaces and connections that cannot simply follow their
process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import click

from checkpoint.files.pathmap import PathMap
from checkpoint.files.policy import AcceptQueues, External, LocalPeers, Policy
from cli.errors import UsageMistake
from migrate.fileoptions import FileOptions

__all__ = ["external", "file_places", "file_policy", "places_of", "policy_of", "require"]

_F = TypeVar("_F", bound=Callable[..., object])


_EXTERNAL = click.option(
    "--external",
    metavar="[PID:]FD=PATH|inherit|close",
    multiple=True,
    help="What becomes of a descriptor that leads out of the trees.",
)


def file_policy(function: _F) -> _F:
    """Give a command the options that concern the source; what it gets by them goes to :func:`policy_of`."""
    return _with(
        function,
        click.option(
            "--local-peer",
            type=click.Choice([policy.value for policy in LocalPeers]),
            default=LocalPeers.REFUSE.value,
            help="What a moved end of a connection sees if the other end stays on this host.  [default: refuse]",
        ),
        click.option(
            "--accept-queue",
            type=click.Choice([policy.value for policy in AcceptQueues]),
            default=AcceptQueues.KEEP.value,
            help="Connections that still wait to be accepted when the processes stop.  [default: keep]",
        ),
        _EXTERNAL,
        click.option("--ship", is_flag=True, help="Files open for writing travel along where they are not shared."),
    )


def file_places(function: _F) -> _F:
    """Give a command the options that concern the target; what it gets by them goes to :func:`places_of`."""
    return _with(
        function,
        click.option(
            "--map",
            "path_map",
            metavar="OLD=NEW",
            multiple=True,
            help="Paths that begin with OLD begin with NEW there.",
        ),
        click.option("--overwrite", is_flag=True, help="Shipped files replace other files at their places."),
        click.option(
            "--map-dev",
            metavar="OLD=NEW",
            multiple=True,
            help="What is on interface OLD (addresses, sockets bound to it) is on NEW there.",
        ),
        click.option(
            "--veth",
            metavar="NAME=BRIDGE",
            multiple=True,
            help="The link NAME of the tree's own network namespace leads into BRIDGE there.",
        ),
    )


def _with(function: _F, *options: Callable[[_F], _F]) -> _F:
    for option in reversed(options):
        function = option(function)
    return function


def external(function: _F) -> _F:
    """Give a command ``--external`` alone."""
    return _with(function, _EXTERNAL)


def policy_of(*, local_peer: str, accept_queue: str, ship: bool, external: tuple[str, ...], **_: object) -> Policy:
    """What the options of :func:`file_policy` say. BadExternal."""
    return Policy(
        local_peer=LocalPeers(local_peer),
        accept_queue=AcceptQueues(accept_queue),
        external=tuple(map(External.parse, external)),
        ship=ship,
    )


def places_of(
    *,
    path_map: tuple[str, ...],
    overwrite: bool,
    map_dev: tuple[str, ...],
    veth: tuple[str, ...] = (),
    ship: bool = False,
    external: tuple[str, ...] = (),
    **_: object,
) -> FileOptions:
    """What the options of :func:`file_places` say, and what of the others the target must know. BadPathMap,
    BadExternal, UsageMistake."""
    return FileOptions(
        path=PathMap.parse(path_map),
        ship=ship,
        overwrite=overwrite,
        external=tuple(map(External.parse, external)),
        devices=dict(_pair("--map-dev OLD=NEW", text) for text in map_dev),
        bridges=dict(_pair("--veth NAME=BRIDGE", text) for text in veth),
    )


def require(wanted: str, given: Mapping[str, object]) -> None:
    """Options that mean nothing without another one must not be given without it: UsageMistake.

    wanted  the other one, which was not given
    given   the options: name to whether, or what, was given
    """
    names = [name for name, value in given.items() if value]
    if names:
        raise UsageMistake(f"{' and '.join(names)} {'want' if len(names) > 1 else 'wants'} {wanted} as well")


def _pair(option: str, text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise UsageMistake(option.replace(" ", " wants "), object=text)
    return old, new
