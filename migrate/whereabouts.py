"""A journal is acted upon where its processes are: in their network namespace, if they have one of their own.

What undoing and finishing touch (sockets, addresses, rules) is found from inside only.  The other host is asked from
where the user is: the remote shell needs the host's network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpoint.namespaces.spaces import entered_network
from migrate.hostfacts import host_facts
from migrate.journal import JournalView, read_journal

__all__ = ["in_its_network"]


@contextlib.contextmanager
def in_its_network(view: JournalView) -> Iterator[JournalView]:
    """The calling thread is in the network namespace that a journal was written in, if it is of this boot and PID
    namespace and any process is left in there; the journal as seen from there."""
    facts = host_facts()
    if view.mine or (view.opened.boot_id, view.opened.pids) != (facts.boot_id, facts.pids):
        yield view
        return
    with entered_network(view.opened.network) as there:
        yield read_journal(view.path) if there else view
