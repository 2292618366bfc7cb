"""Calls by which a new process enters a namespace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from checkpoint.errors import NamespaceNotMade
from tcpstate.kernel.calls import CallError, CallTable

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["run_in"]


def run_in(stub: Stub, calls: CallTable) -> None:
    """Make them, if there are any. NamespaceNotMade."""
    if not len(calls):
        return
    try:
        stub.run(calls)
    except CallError as error:
        name = f"pid {stub.pid}"
        raise NamespaceNotMade(f"cannot {error.label}: {os.strerror(error.errno or 0)}", object=name) from error
