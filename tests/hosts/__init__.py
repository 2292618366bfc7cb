"""Hosts for tests: network, PID, mount, UTS, IPC and time namespaces with an init each, joined by a bridge.

A `Net` is a bridge, a `Host` is one machine on it.  Everything is anonymous (namespaces are held by descriptors and by
the inits), so that nothing is left behind whichever way the process that made them ends.
"""

from tests.hosts.host import Host
from tests.hosts.net import Net, ThreeHosts, three_hosts
from tests.hosts.process import CommandFailed, HostProcess

__all__ = ["CommandFailed", "Host", "HostProcess", "Net", "ThreeHosts", "three_hosts"]
