"""``tcpmig chaperone``: the privileged helper for unprivileged owners of connections."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import click

from cli.command import command
from cli.session import Result, Session
from tcpstate.chaperone.client import DEFAULT_SOCKET
from tcpstate.chaperone.messages import Limits
from tcpstate.chaperone.policy import Network, Policy
from tcpstate.chaperone.service import serve
from tcpstate.signing import Signer, Verifier

__all__ = ["chaperone"]

_LIMITS = Limits()
_PORT = click.IntRange(1, 65535)


def _networks(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(value, strict=False) for value in values)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@command("chaperone", json=False)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    default=DEFAULT_SOCKET,
    type=click.Path(path_type=Path),
    help=f"Where it listens ({DEFAULT_SOCKET}).",
)
@click.option("--user", metavar="NAME", help="Who it becomes; the capabilities it needs are kept.")
@click.option(
    "--address",
    "addresses",
    metavar="ADDRESS[/LENGTH]",
    callback=_networks,
    multiple=True,
    help="Connections of this address are rebuilt although it is not here yet; may be repeated.",
)
@click.option(
    "--low-port",
    "low_ports",
    metavar="PORT",
    type=_PORT,
    multiple=True,
    help="Anyone may rebuild on this privileged port; may be repeated.",
)
@click.option(
    "--sign", metavar="KEYFILE", type=click.Path(path_type=Path), help="Sign exported records with this private key."
)
@click.option(
    "--require-signature",
    "trusted",
    metavar="KEYFILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Rebuild only records signed with this public key; may be repeated.",
)
@click.option("--keep-frozen", is_flag=True, help="What a client froze stays frozen when it vanishes.")
@click.option(
    "--frozen-seconds",
    metavar="SECONDS",
    type=click.FloatRange(1, 86400),
    default=_LIMITS.seconds,
    help=f"For how long at most ({_LIMITS.seconds:g}).",
)
@click.option(
    "--frozen-most",
    metavar="COUNT",
    type=click.IntRange(1),
    default=_LIMITS.frozen,
    help=f"How many of one user at a time ({_LIMITS.frozen}).",
)
@click.option(
    "--rate",
    metavar="COUNT",
    type=click.FloatRange(1),
    default=_LIMITS.rate,
    help=f"Requests per second of one user ({_LIMITS.rate:g}).",
)
@click.option(
    "--request-bytes",
    metavar="BYTES",
    type=click.IntRange(1 << 12, 1 << 30),
    default=_LIMITS.frame,
    help=f"The largest request or record ({_LIMITS.frame}).",
)
def chaperone(
    session: Session,
    path: Path,
    user: str | None,
    addresses: tuple[Network, ...],
    low_ports: tuple[int, ...],
    sign: Path | None,
    trusted: tuple[Path, ...],
    keep_frozen: bool,
    frozen_seconds: float,
    frozen_most: int,
    rate: float,
    request_bytes: int,
) -> Result | None:
    """Serve processes that move their own connections, until SIGTERM or Ctrl-C.

    It drops all privileges but the few that it needs. Each request leaves a line on stderr and in the log.
    """
    limits = Limits(
        frame=request_bytes, frozen=frozen_most, rate=rate, burst=max(1, int(2 * rate)), seconds=frozen_seconds
    )
    policy = Policy(
        limits=limits,
        addresses=addresses,
        low_ports=frozenset(low_ports),
        keep_frozen=keep_frozen,
        sign=Signer(sign) if sign is not None else None,
        verify=Verifier(trusted) if trusted else None,
    )
    serve(path, policy, user)
    return None
