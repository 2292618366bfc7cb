"""`restore` of a tree that has a network namespace of its own: which one it comes into."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from checkpoint.namespaces.network import Network, NewNetwork
from checkpoint.namespaces.spaces import entered_network
from migrate.addresses import AddressRecord, read_configuration
from migrate.announce import LinkSocket
from migrate.arrival import PROBE_WAIT
from migrate.errors import AddressTakenAtTarget
from migrate.fileoptions import FileOptions
from migrate.hold import HoldMade
from migrate.hostfacts import host_facts
from migrate.rtnetlink import Netlink

__all__ = ["enter_network", "probe"]


def enter_network(
    ends: contextlib.ExitStack, own: Network | None, made: HoldMade | None, files: FileOptions
) -> NewNetwork | None:
    """Of a tree with a network namespace of its own: be in one like it, or in that one, if its connections are held in
    it, until the stack is unwound. What was made anew, and is not connected yet. BridgeMissing, NamespaceNotMade.

    own   the namespace; None: the tree has none
    made  the hold of its connections on this host
    """
    if own is None:
        return None
    if made is not None and made.boot_id == host_facts().boot_id and ends.enter_context(entered_network(made.network)):
        return None
    network = NewNetwork(own, files.bridges)
    for error in network.check():
        raise error
    ends.callback(network.close)
    network.enter()
    return network


def probe(network: NewNetwork, coming: Sequence[AddressRecord], ignore: Sequence[str]) -> None:
    """Addresses that will be inside of a new namespace must be nobody's behind the bridges that it is connected to: the
    original may still run. AddressTakenAtTarget."""
    with network.outside() as bridges, Netlink() as netlink:
        here = read_configuration(netlink)
        for link, bridge in bridges.items():
            names = [record.address for record in coming if record.interface == link]
            device = here.named(bridge)
            if device is None or not device.up or not names:
                continue
            with LinkSocket(device.name, device.mac, listen=True) as wire:
                for claim in wire.ask(names, ignore=ignore, wait=PROBE_WAIT):
                    raise AddressTakenAtTarget(f"{claim.mac} answers for it", object=claim.address)
