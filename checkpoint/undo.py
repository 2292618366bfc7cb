"""What a dead tool has changed at the source, put back from what it wrote down (:mod:`checkpoint.traces`).

Every function may be repeated, and may be cut short at any moment: what is right already is left alone.  In order::

    wait_untraced     the kernel has let the processes go
    thaw, or discard  connections as they were (peers are asked for an ACK), or ended without a packet
    open_listeners    listeners take new connections
    refill            what was taken out of their accept queues waits there again
    take_locks        file locks that were given up
    restore_options   of sockets whose queues were being read
    clean_memory      code and memory of ours in the processes
    go_on, or end     the processes run, last; or are killed

Nothing of a process that has ended is looked for, nor of another one that has got its number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from checkpoint import preflight, procfs
from checkpoint.errors import LockTaken, NoSuchProcess, StopTimeout
from checkpoint.files import locks
from checkpoint.files.abi import pidfd_getfd
from checkpoint.files.sockopts import IPPROTO_MPTCP
from checkpoint.files.tcp import Original, TcpGroup
from checkpoint.leftovers import clean, leftovers
from checkpoint.tracee import Tree
from checkpoint.traces import FrozenTree, GivenUpLock, HeldListeners, Peeked, Traced, alive, listener_name
from tcpstate import acceptqueue
from tcpstate.discard import discard_connections
from tcpstate.errors import ForeignFilter
from tcpstate.filters import ListenerState, remove_syn_filter, undo_drop_syns
from tcpstate.freeze import thaw as thaw_sockets
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, TcpState
from tcpstate.rows import describe
from tcpstate.shelf import Shelved
from tcpstate.silence import MARK

__all__ = [
    "clean_memory",
    "discard",
    "end",
    "go_on",
    "open_listeners",
    "refill",
    "restore_options",
    "take_locks",
    "taken",
    "thaw",
    "wait_untraced",
]

_log = logging.getLogger(__name__)

#: seconds in which the kernel lets tracees of a dead tool go, and killed processes end
_WAIT: Final = 5.0
_PAUSE: Final = 0.005


def wait_untraced(processes: Sequence[Traced]) -> None:
    """Until nobody traces them. StopTimeout: a tool that lives does."""
    deadline = time.monotonic() + _WAIT
    for traced in processes:
        while alive([traced]) and (tracer := _tracer(traced.pid)):
            if time.monotonic() > deadline:
                raise StopTimeout(f"pid {tracer} traces it", object=f"pid {traced.pid}")
            time.sleep(_PAUSE)


def _tracer(pid: int) -> int:
    try:
        return int(procfs.read_status(pid)["TracerPid"])
    except NoSuchProcess:
        return 0


@contextlib.contextmanager
def taken(places: Iterable[tuple[int, int]], processes: Sequence[Traced]) -> Iterator[int]:
    """Our own descriptor of the open file at the first of its places that is still there; -1 if none is."""
    numbers = {traced.pid for traced in alive(processes)}
    found = -1
    for pid, fd in places:
        if pid in numbers and (found := _take(pid, fd)) >= 0:
            break
    try:
        yield found
    finally:
        if found >= 0:
            os.close(found)


def _take(pid: int, fd: int) -> int:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    try:
        return pidfd_getfd(pidfd, fd)
    except OSError as error:
        _log.debug("pid %d has closed fd %d: %s", pid, fd, error)
        return -1
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def _connections(tree: FrozenTree) -> Iterator[list[tuple[socket.socket, Original]]]:
    """The sockets that are still what they were: the same connection, or none any more."""
    living = alive(tree.processes)
    found: list[tuple[socket.socket, Original]] = []
    with contextlib.ExitStack() as ends:
        for original in tree.connections:
            fd = ends.enter_context(taken(original.places, living))
            sock = _tcp(fd)
            if sock is not None and (describe(sock) == original.name or _is_closed(sock)):
                found.append((ends.enter_context(sock), original))
            elif sock is not None:
                sock.close()
        yield found


def _tcp(fd: int) -> socket.socket | None:
    """A TCP socket on a duplicate of the descriptor; None if it is something else by now."""
    if fd < 0:
        return None
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    if sock.type == socket.SOCK_STREAM and sock.proto in (socket.IPPROTO_TCP, IPPROTO_MPTCP):
        return sock
    sock.close()
    return None


def _is_closed(sock: socket.socket) -> bool:
    return sock.getsockopt(Level.TCP, TCP.INFO, 1)[0] == TcpState.CLOSE


def thaw(tree: FrozenTree) -> int:
    """Connections as they were, out of repair; each asks its peer for an ACK. How many. ConnectionCallFailed."""
    with _connections(tree) as found:
        for sock, original in found:
            # the export changes these for a moment, and repair mode clears the last
            _set(sock, Level.SOCKET, SO.OOBINLINE, int(original.inline))
            if original.peek_off >= 0:
                _set(sock, Level.SOCKET, SO.PEEK_OFF, original.peek_off)
            elif sock.getsockopt(Level.SOCKET, SO.PEEK_OFF) >= 0:
                _set(sock, Level.SOCKET, SO.PEEK_OFF, -1)
        thaw_sockets([sock for sock, _ in found], [original.state for _, original in found])
        for sock, original in found:
            _set(sock, Level.SOCKET, SO.REUSEADDR, int(original.state.reuse_address))
        return len(found)


def _set(sock: socket.socket, level: int, option: int, value: int) -> None:
    try:
        sock.setsockopt(level, option, value)
    except OSError as error:
        # the socket ended meanwhile: its owner will see that
        _log.warning("%s: an option cannot be given back: %s", describe(sock), error)


def discard(tree: FrozenTree) -> int:
    """End the connections without a packet. The addresses must be gone. How many. ConnectionCallFailed."""
    with _connections(tree) as found:
        living = [sock for sock, _ in found if not _is_closed(sock)]
        discard_connections(living, close=False)
    return len(living) + (_discard_rest(tree.processes) if tree.more else 0)


def _discard_rest(processes: Sequence[Traced]) -> int:
    """Whatever else they have: what was told ahead of the stop stands in no list. How many."""
    with preflight.live_files([each.pid for each in alive(processes)]) as files:
        rest = TcpGroup(files).established
        discard_connections(rest, close=False)
        return len(rest)


def open_listeners(held: HeldListeners, processes: Sequence[Traced]) -> int:
    """Listeners, and what they accepted meanwhile, have their own filters again. How many listeners."""
    count = 0
    for listener in held.listeners:
        with taken(listener.places, processes) as fd:
            sock = _tcp(fd)
            if sock is None:
                continue
            with sock:
                if sock.getsockopt(Level.SOCKET, SO.ACCEPTCONN) and listener_name(sock) == listener.name:
                    marked = sock.getsockopt(Level.SOCKET, SO.MARK) == MARK
                    mark = listener.mark if marked else None
                    undo_drop_syns([sock], [ListenerState(filter=listener.filter, mark=mark)])
                    count += 1
    with preflight.live_files([traced.pid for traced in alive(processes)]) as now:
        for sock in TcpGroup(now).established:
            # an eBPF filter is none of a listener's: it is a frozen connection's, or the application's own
            with contextlib.suppress(ForeignFilter):
                remove_syn_filter([sock])
    return count


def refill(shelved: Shelved, held: HeldListeners, processes: Sequence[Traced]) -> int:
    """Connections that waited to be accepted wait again. After :func:`open_listeners`. How many there were."""
    shelf = shelved.open()
    if shelf is None:
        return 0
    with shelf, contextlib.ExitStack() as ends:
        socks = [ends.enter_context(sock) for sock in shelf.sockets()]
        listeners = []
        for listener in held.listeners:
            sock = _tcp(ends.enter_context(taken(listener.places, processes)))
            if sock is not None:
                listeners.append(ends.enter_context(sock))
        for record, reason in acceptqueue.put_back(socks, listeners):
            _log.warning("%s could not be put back into the queue of its listener: %s", record.conn_id, reason)
    shelved.holder.end()
    return len(socks)


def take_locks(given_up: Sequence[GivenUpLock], processes: Sequence[Traced]) -> None:
    """Take back what was given up. LockTaken names the first that somebody else has."""
    failed: LockTaken | None = None
    for each in given_up:
        with taken(each.places, processes) as fd:
            if fd >= 0 and not locks.take(fd, each.lock):
                pid, number = each.places[0]
                failed = failed or LockTaken("somebody else has a file lock now", object=f"pid {pid} fd {number}")
    if failed is not None:
        raise failed


def restore_options(peeked: Peeked, processes: Sequence[Traced]) -> None:
    """Options of sockets that are no TCP connections."""
    for places, options in peeked.sockets:
        with taken(places, processes) as fd:
            if fd < 0:
                continue
            try:
                sock = socket.socket(fileno=os.dup(fd))
            except OSError:
                continue  # something else by now
            with sock:
                for level, option, value in options:
                    _set(sock, level, option, value)


def clean_memory(processes: Sequence[Traced]) -> int:
    """Take away what is left of ours in the memory of processes and all below them. In how many.

    A thread that is in a handler that will return into left code keeps it, harmlessly, until a later tool comes.
    """
    members = {pid for traced in alive(processes) for pid in procfs.tree(traced.pid)}
    left = [pid for pid in sorted(members) if not _gone(pid) and leftovers(pid) is not None]
    if not left:
        return 0
    cleaned = 0
    tree = Tree.stop(left)
    try:
        for process in tree.processes:
            try:
                cleaned += clean(process)
            except StopTimeout as error:
                _log.warning("%s; it is harmless, and the next tcpmig tries again", error)
    finally:
        tree.resume()
    return cleaned


def _gone(pid: int) -> bool:
    try:
        return procfs.read_stat(pid).zombie
    except NoSuchProcess:
        return True


def go_on(processes: Sequence[Traced]) -> int:
    """Let processes run that our death has left stopped; those that were stopped anyway stay so. How many."""
    count = 0
    for traced in processes:
        if not traced.stop_signal:
            count += _send(traced, signal.SIGCONT)
    return count


def end(processes: Sequence[Traced]) -> int:
    """Kill them, and wait until they are gone. How many there were. StopTimeout."""
    count = sum(_send(traced, signal.SIGKILL) for traced in reversed(processes))
    deadline = time.monotonic() + _WAIT
    while left := alive(processes):
        if time.monotonic() > deadline:
            raise StopTimeout("it does not end", object=f"pid {left[0].pid}")
        time.sleep(_PAUSE)
    return count


def _send(traced: Traced, number: int) -> bool:
    try:
        pidfd = os.pidfd_open(traced.pid)
    except ProcessLookupError:
        return False
    try:
        # the descriptor came first: from here on the number cannot pass to another process unnoticed
        if not alive([traced]):
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
