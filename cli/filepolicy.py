"""The options by which a user decides about files and connections that cannot simply follow their process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from checkpoint.files.policy import LocalPeers, Policy

__all__ = ["file_policy", "policy_of"]

_F = TypeVar("_F", bound=Callable[..., object])


def file_policy(function: _F) -> _F:
    """Give a command the options; it hands what it gets by them to :func:`policy_of`."""
    return click.option(
        "--local-peer",
        type=click.Choice([policy.value for policy in LocalPeers]),
        default=LocalPeers.REFUSE.value,
        help="What a moved end of a connection sees if the other end stays on this host.  [default: refuse]",
    )(function)


def policy_of(*, local_peer: str) -> Policy:
    """What the options say."""
    return Policy(local_peer=LocalPeers(local_peer))
