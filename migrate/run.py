"""A migration as a whole, put together from its parts: what the commands call."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from checkpoint.files.policy import NO_POLICY, Policy
from checkpoint.namespaces.spaces import Kind, entered, own_kinds
from migrate.addresses import read_configuration
from migrate.incoming import IncomingTrees
from migrate.outgoing import OutgoingTrees
from migrate.rtnetlink import Netlink
from migrate.source import Source
from migrate.summary import Checked, SourceOptions, Summary
from migrate.takeover import all_addresses
from migrate.target import Received, Target
from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH, Remote
from migrate.wire import Channel

__all__ = ["check", "migrate", "receive"]


def migrate(
    roots: Sequence[int],
    host: str,
    *,
    rsh: str = DEFAULT_RSH,
    remote_command: str = DEFAULT_REMOTE_COMMAND,
    options: SourceOptions | None = None,
    policy: Policy = NO_POLICY,
) -> Summary:
    """Move the process trees at ``roots`` to ``host``. Raises the TcpmigError that ended it; see
    :meth:`migrate.source.Source.run`."""
    with Remote(host, rsh=rsh, remote_command=remote_command) as remote, entered(roots[0]):
        return Source(_trees(roots, policy, options), remote, _with_network(roots, options)).run()


def check(
    roots: Sequence[int],
    host: str,
    *,
    rsh: str = DEFAULT_RSH,
    remote_command: str = DEFAULT_REMOTE_COMMAND,
    options: SourceOptions | None = None,
    policy: Policy = NO_POLICY,
) -> Checked:
    """Could they be moved? Both hosts are asked; nothing is stopped or changed. Raises the first refusal."""
    with Remote(host, rsh=rsh, remote_command=remote_command) as remote, entered(roots[0]):
        return Source(_trees(roots, policy, options), remote, _with_network(roots, options)).check()


def _with_network(roots: Sequence[int], options: SourceOptions | None) -> SourceOptions:
    """What the options mean for a tree in a network namespace of its own, in which we are: all of its addresses move,
    and its links have the same names there."""
    options = options or SourceOptions()
    if Kind.NET not in own_kinds(roots[0]):
        return options
    with Netlink() as netlink:
        here = read_configuration(netlink)
        address = all_addresses(netlink) if options.address == "auto" else options.address
    names = {interface.name: interface.name for interface in here.interfaces if not interface.loopback}
    return replace(options, address=address, map_dev=names | options.map_dev)


def _trees(roots: Sequence[int], policy: Policy, options: SourceOptions | None) -> OutgoingTrees:
    return OutgoingTrees(roots, policy, unit_hook=options is not None and bool(options.unit_hook))


def receive(*, unit_hook: str = "") -> Received | None:
    """The target's half, on our standard input and output; what is printed from now on goes to standard error.

    unit_hook  ``--unit-hook``: a program for this host
    """
    sys.stdout.flush()
    line = os.dup(1)
    os.dup2(2, 1)
    return Target(IncomingTrees(), Channel(0, line, listens=False), unit_hook=unit_hook).run()
