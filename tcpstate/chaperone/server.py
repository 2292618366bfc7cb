"""The chaperone's sockets: one thread, one request at a time, and nobody may make the others wait.

A client that is slow with a frame or with its answers is cut off, one that vanishes leaves nothing frozen.  Each
request leaves a line in the log (logger ``tcpstate.chaperone.audit``): who, what, which connection, what came of it;
never a record or a byte of a stream.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

from tcpstate import codec
from tcpstate.chaperone.holding import Holding
from tcpstate.chaperone.identity import Peer, nameless, peer_of
from tcpstate.chaperone.messages import Failed, Message, Request, Welcome
from tcpstate.chaperone.operations import Context, perform
from tcpstate.chaperone.policy import Policy, RateLimit
from tcpstate.chaperone.protocol import Received, ServerProtocol, encode
from tcpstate.errors import BadChaperoneMessage, ChaperoneLimit, ChaperoneRuns, NotYours, TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["Server", "listen"]

_log = logging.getLogger(__name__)
_audit = logging.getLogger("tcpstate.chaperone.audit")

#: seconds between two looks at what was captured and what has expired
_TICK = 0.25
_CHUNK = 256 << 10
#: descriptors that one read takes; the kernel closes what is beyond them, and tells
_DESCRIPTORS = 8


def listen(path: Path) -> socket.socket:
    """The socket on which clients come; anyone may, since the kernel tells who it is. ChaperoneRuns, OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            # its server died
            path.unlink()
        except FileNotFoundError:
            # the usual case: none has been here
            _log.debug("%s is new", path)
        else:
            raise ChaperoneRuns("a chaperone answers there", object=str(path))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock


@dataclass(slots=True, eq=False)
class _Session:
    """One client.

    since   when its frame began, or its oldest answer had to wait; None: neither
    heard   when it last said something
    out     what is still to be sent: bytes, and the socket that goes with the first of them
    ending  it is let go once that is sent
    """

    number: int
    sock: socket.socket
    peer: Peer
    protocol: ServerProtocol
    heard: float
    since: float | None = None
    out: deque[tuple[memoryview, socket.socket | None]] = field(default_factory=deque)
    ending: bool = False

    def queue(self, message: Message, sock: socket.socket | None = None) -> None:
        self.out.append((memoryview(encode(message)), sock))


class Server:
    """Serves until :meth:`stop`.

    listener  of :func:`listen`, closed by :meth:`close`
    clock     monotonic seconds
    tick      for how long a turn waits for something to come, seconds
    """

    def __init__(
        self,
        listener: socket.socket,
        policy: Policy,
        holding: Holding,
        clock: Callable[[], float] = time.monotonic,
        tick: float = _TICK,
    ) -> None:
        self._tick = tick
        self._listener = listener
        self._policy = policy
        self._holding = holding
        self._clock = clock
        self._rate = RateLimit(policy.limits)
        self._sessions: dict[int, _Session] = {}
        self._numbers = itertools.count(1)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._stopping = False
        self._looked = 0.0

    def stop(self) -> None:
        """End :meth:`serve` at its next turn; may be called by a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Until stopped. Then everything that is held is given back."""
        try:
            while not self._stopping:
                self.turn()
        finally:
            self.close()

    def close(self) -> None:
        """Let all clients go, give back what is held."""
        for session in list(self._sessions.values()):
            self._end(session, "the chaperone ends", resume=False)
        self._holding.close()
        self._selector.close()
        self._listener.close()

    def turn(self) -> None:
        """What has come, once; then what has expired."""
        for key, events in self._selector.select(self._tick):
            session = key.data
            if session is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE:
                self._write(session)
            if events & selectors.EVENT_READ and session.number in self._sessions:
                self._read(session)
        now = self._clock()
        if now - self._looked >= self._tick:
            self._looked = now
            self._expire(now)

    # ---- clients

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # it went away again, or there are no descriptors left for it
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EMFILE, errno.ENFILE):
                raise
            _log.warning("a client was not taken: %s", error.strerror)
            return
        sock.setblocking(False)
        peer = peer_of(sock)
        of_user = Counter(session.peer.uid for session in self._sessions.values())[peer.uid]
        now = self._clock()
        limits = self._policy.limits
        session = _Session(next(self._numbers), sock, peer, ServerProtocol(peer.uid, limits), heard=now, since=now)
        self._sessions[session.number] = session
        self._selector.register(sock, selectors.EVENT_READ, session)
        if nameless(peer.uid):
            self._refuse(session, NotYours(f"uid {peer.uid} stands for users of other namespaces here"))
        elif of_user >= self._policy.clients or len(self._sessions) > self._policy.clients_of_all:
            self._refuse(session, ChaperoneLimit(f"there are {of_user} clients of uid {peer.uid} already"))

    def _read(self, session: _Session) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(session.sock, _CHUNK, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(session, error.strerror or "broken")
            return
        if not data or flags & socket.MSG_CTRUNC:
            for descriptor in descriptors:
                os.close(descriptor)
        if not data:
            self._end(session, "gone")
            return
        session.heard = self._clock()
        try:
            if flags & socket.MSG_CTRUNC:
                raise BadChaperoneMessage("too many descriptors at once")
            # one by one: an answer is queued before the next request is looked at
            for event in session.protocol.receive(data, descriptors):
                if session.ending:
                    self._drop(event)
                else:
                    self._event(session, event)
        except BadChaperoneMessage as error:
            self._refuse(session, error)
        if not session.protocol.busy and not session.out:
            session.since = None
        elif session.since is None:
            session.since = session.heard
        self._write(session)

    @staticmethod
    def _drop(event: Received | Welcome) -> None:
        if isinstance(event, Received) and event.descriptor >= 0:
            os.close(event.descriptor)

    def _event(self, session: _Session, event: Received | Welcome) -> None:
        if isinstance(event, Welcome):
            session.queue(event)
            return
        request = event.request
        begun = self._clock()
        conn, sock = request.conn, None
        try:
            if not self._rate.take(session.peer.uid, begun):
                self._drop(event)
                raise ChaperoneLimit(f"more than {self._policy.limits.rate:g} requests a second")
            context = Context(
                peer=session.peer, session=session.number, policy=self._policy, holding=self._holding, now=begun
            )
            outcome = perform(event, context)
            answer: Message = outcome.answer
            conn, sock, result = str(outcome.conn), outcome.sock, "done"
        except TcpmigError as error:
            answer = _failed(error, request.number)
            conn, result = conn or error.object, error.code
        except Exception as error:  # a mistake of ours must not end what others have frozen
            _log.exception("a request was not done")
            answer = _failed(TcpmigError(f"unexpected {type(error).__name__}"), request.number)
            result = "unexpected"
        _note(session.peer, request, conn, result, self._clock() - begun)
        session.queue(answer, sock)

    def _write(self, session: _Session) -> None:
        try:
            while session.out:
                data, sock = session.out[0]
                if sock is not None:
                    sent = socket.send_fds(session.sock, [data], [sock.fileno()], socket.MSG_NOSIGNAL)
                    sock.close()
                else:
                    sent = session.sock.send(data, socket.MSG_NOSIGNAL)
                if sent < len(data):
                    session.out[0] = (data[sent:], None)
                else:
                    session.out.popleft()
        except BlockingIOError:
            # goes on when there is room
            _log.debug("client %d does not read", session.number)
        except OSError as error:
            self._end(session, error.strerror or "broken")
            return
        if session.out:
            session.since = session.since or self._clock()
            # who does not take answers is not asked for more
            self._selector.modify(session.sock, selectors.EVENT_WRITE, session)
        elif session.ending:
            self._end(session, "refused")
        else:
            if not session.protocol.busy:
                session.since = None
            self._selector.modify(session.sock, selectors.EVENT_READ, session)

    def _refuse(self, session: _Session, error: TcpmigError) -> None:
        """The last word to a client."""
        _audit.warning("uid=%d pid=%d refused: %s", session.peer.uid, session.peer.pid, _one_line(str(error)))
        session.queue(_failed(error, 0))
        session.ending = True
        self._selector.modify(session.sock, selectors.EVENT_WRITE, session)

    def _end(self, session: _Session, why: str, *, resume: bool = True) -> None:
        if self._sessions.pop(session.number, None) is None:
            return
        _log.debug("client %d (uid %d) ends: %s", session.number, session.peer.uid, why)
        self._selector.unregister(session.sock)
        session.sock.close()
        for descriptor in session.protocol.leftover():
            os.close(descriptor)
        for _, sock in session.out:
            if sock is not None:
                sock.close()
        if resume:
            for held in [h for h in self._holding.held.values() if h.session == session.number]:
                if held.state is None or not self._policy.keep_frozen:
                    self._holding.let_go(held)

    def _expire(self, now: float) -> None:
        self._holding.drain()
        for held in [h for h in self._holding.held.values() if h.until <= now]:
            _audit.warning("uid=%d pid=%d conn=%s was frozen for too long", held.uid, held.pid, held.conn_id)
            self._holding.let_go(held)
        busy = {held.session for held in self._holding.held.values()}
        for session in list(self._sessions.values()):
            if session.since is not None and now - session.since > self._policy.seconds:
                self._end(session, "too slow")
            elif session.number not in busy and now - session.heard > self._policy.idle:
                self._end(session, "idle")


def _failed(error: TcpmigError, number: int) -> Failed:
    return Failed(number=number, **error.as_dict())


def _note(peer: Peer, request: Request, conn: str, result: str, seconds: float) -> None:
    what = codec.kind_of(type(request))
    _audit.info(
        "uid=%d pid=%d %s conn=%s result=%s ms=%.1f", peer.uid, peer.pid, what, _one_line(conn) or "-", result,
        seconds * 1e3,
    )  # fmt: skip


def _one_line(text: str) -> str:
    """What a client has written cannot begin a line of its own in the log."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])
