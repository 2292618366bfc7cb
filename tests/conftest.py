"""What all tests share: the hosts, and that no property test is judged by the clock."""

from hypothesis import HealthCheck, settings

from tests.hosts.fixtures import client, hosts, net, source, target

__all__ = ["client", "hosts", "net", "source", "target"]

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
