"""Which BPF programs the kernel takes only if they are offered under the GPL as well: those that say so, no others."""

import contextlib
import os

import pytest

from checkpoint.kernel import protkeys, restart_block, sem_undo
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call, drop, handshake, memory, opensock, sockerror, tcpsock, urgentmode, windows
from tcpstate.kernel.bpf.layout import layout

#: what loads each program anew
LOADERS = {
    "windows": lambda: windows.WindowSetter(layout()),
    "handshake": lambda: handshake.Vouching(()),
    "tcpsock": tcpsock._reader.__wrapped__,
    "urgentmode": urgentmode._link.__wrapped__,
    "sockerror": sockerror._link.__wrapped__,
    "opensock": opensock._program.__wrapped__,
    "memory": memory.KernelMemory,
    "sem_undo": sem_undo._reader.__wrapped__,
    "protkeys": protkeys._reader.__wrapped__,
    "restart_block": restart_block._reader.__wrapped__,
}


@pytest.fixture
def loads(monkeypatch):
    """(licence that it was loaded with, how that ended) of each program, nothing stays loaded."""
    seen = []
    real = call._call

    def watched(command, attr, *rest):
        if command is not call._Cmd.PROG_LOAD:
            return real(command, attr, *rest)
        try:
            made = real(command, attr, *rest)
        except OSError:
            seen.append(False)
            raise
        seen.append(True)
        return made

    monkeypatch.setattr(call, "_call", watched)
    return seen


@pytest.mark.parametrize("name", LOADERS)
def test_it_is_refused_without(name, loads, monkeypatch):
    monkeypatch.setattr(call, "_GPL_TOO", call._LICENCE)
    with contextlib.suppress(KernelFeatureMissing, OSError):
        LOADERS[name]()
    # a second time for what the verifier has to say
    assert loads == [False, False]


@pytest.mark.parametrize("make", [drop.drop_program.__wrapped__, lambda: drop.mark_program.__wrapped__(7)])
def test_filters_of_sockets_need_it_not(make, loads):
    os.close(make())
    assert loads == [True]
