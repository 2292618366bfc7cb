"""What all tests share: the hosts."""

from tests.hosts.fixtures import client, hosts, net, source, target

__all__ = ["client", "hosts", "net", "source", "target"]
