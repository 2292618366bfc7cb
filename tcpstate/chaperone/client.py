"""The client: what an unprivileged process asks of the chaperone.

::

    with Chaperone() as chaperone:
        chaperone.freeze(sock)                      # or a ConnId, or its text
        record = chaperone.export(sock)             # bytes, to the other host
        ...
        conn_id = chaperone.rebuild(record, elapsed=seconds)     # there, through its own chaperone
        ...                                         # the address moves
        sock = chaperone.release(conn_id)           # there: alive
        chaperone.discard(old)                      # here

What was frozen flows again when the client closes its connection to the chaperone, or ends.  One request at a time: a
client is for one thread.
"""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from tcpstate.chaperone.messages import (
    Answer,
    Discard,
    Done,
    Export,
    Exported,
    Failed,
    Freeze,
    Get,
    Items,
    Limits,
    Rebuild,
    Release,
    Request,
    Resume,
    plain_items,
)
from tcpstate.chaperone.protocol import ClientProtocol, encode
from tcpstate.connid import ConnId
from tcpstate.errors import BadChaperoneMessage, ChaperoneUnreachable, TcpmigError, catalogue
from tcpstate.record import ConnectionRecord

__all__ = ["DEFAULT_SOCKET", "Chaperone", "Target", "socket_path"]

DEFAULT_SOCKET: Final = "/run/tcpmig-chaperone/socket"
_ENVIRONMENT: Final = "TCPMIG_CHAPERONE"
_CHUNK: Final = 256 << 10

#: a connection: by its name, or by the client's own socket
Target = ConnId | str | socket.socket
A = TypeVar("A", bound=Answer)


def socket_path() -> str:
    """Where the chaperone listens: ``TCPMIG_CHAPERONE``."""
    return os.environ.get(_ENVIRONMENT) or DEFAULT_SOCKET


class Chaperone:
    """A connection to the chaperone. A context manager.

    path     its socket; None: :func:`socket_path`
    timeout  seconds that an answer may take

    ChaperoneUnreachable from every method that asks; the error that the chaperone tells, as the class that it is.
    """

    def __init__(self, path: str | None = None, *, timeout: float = 30.0) -> None:
        self._path = socket_path() if path is None else path
        self._protocol = ClientProtocol()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._received: list[int] = []
        try:
            self._sock.settimeout(timeout)
            self._sock.connect(self._path)
            self._sock.sendall(self._protocol.hello())
            self._answer()
        except OSError as error:
            self.close()
            raise self._unreachable(error) from None
        except BaseException:
            self.close()
            raise

    @property
    def limits(self) -> Limits:
        """What it grants."""
        if self._protocol.limits is None:
            raise ChaperoneUnreachable("there was no welcome", object=self._path)
        return self._protocol.limits

    def get(self, target: Target, *keywords: str) -> dict[str, Any]:
        """Items by keyword: what TCP_INFO and the socket options tell while it flows (:mod:`tcpstate.observe`)."""
        request = Get(number=self._protocol.next_number(), conn=_name(target), keywords=keywords)
        return plain_items(self._ask(request, target, Items).items)

    def freeze(self, target: Target) -> ConnId:
        """Nothing comes in, nothing goes out, until :meth:`resume`, or until the chaperone's time limit."""
        return self._done(Freeze(number=self._protocol.next_number(), conn=_name(target)), target)

    def resume(self, target: Target) -> ConnId:
        """It flows again."""
        return self._done(Resume(number=self._protocol.next_number(), conn=_name(target)), target)

    def export(self, target: Target) -> bytes:
        """The record of a frozen connection, as :meth:`rebuild` takes it: signed, if the chaperone signs.

        Its process must not use the socket from here on until it is resumed. By conn-ID, another process of the same
        user must be stopped.
        """
        return self._ask(Export(number=self._protocol.next_number(), conn=_name(target)), target, Exported).record

    def discard(self, target: Target, *, anyway: bool = False) -> ConnId:
        """The silent end of an exported connection, whose address has left this host (or ``anyway``), or of a rebuilt
        one."""
        return self._done(Discard(number=self._protocol.next_number(), conn=_name(target), anyway=anyway), target)

    def rebuild(self, record: bytes | ConnectionRecord, *, elapsed: float) -> ConnId:
        """Build the connection, silent; ``elapsed``: seconds since the export returned, rather too much than too
        little, measured by one clock."""
        data = record.to_bytes() if isinstance(record, ConnectionRecord) else bytes(record)
        return self._done(Rebuild(number=self._protocol.next_number(), record=data, elapsed=elapsed), "")

    def release(self, conn_id: ConnId | str) -> socket.socket:
        """A rebuilt connection lives, once its address is here: its socket."""
        self._done(Release(number=self._protocol.next_number(), conn=str(conn_id)), conn_id)
        if not self._received:
            raise BadChaperoneMessage("no socket came with the answer", object=str(conn_id))
        return socket.socket(fileno=self._received.pop())

    def close(self) -> None:
        """What was frozen for this client and neither resumed nor discarded flows again."""
        self._sock.close()
        while self._received:
            os.close(self._received.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- asking

    def _done(self, request: Request, target: Target) -> ConnId:
        return ConnId.parse(self._ask(request, target, Done).conn)

    def _ask(self, request: Request, target: Target, kind: type[A]) -> A:
        frame = encode(request)
        self._protocol.check(frame)
        try:
            if isinstance(target, socket.socket):
                sent = socket.send_fds(self._sock, [frame], [target.fileno()], socket.MSG_NOSIGNAL)
                self._sock.sendall(memoryview(frame)[sent:], socket.MSG_NOSIGNAL)
            else:
                self._sock.sendall(frame, socket.MSG_NOSIGNAL)
            answer = self._answer()
        except OSError as error:
            raise self._unreachable(error) from None
        if not isinstance(answer, kind):
            raise BadChaperoneMessage(f"the answer is a {type(answer).__name__}", object=self._path)
        return answer

    def _answer(self) -> Answer | None:
        """The next message; None for the welcome. The error that it tells; OSError."""
        data = b""
        while (message := self._protocol.receive(data)) is None:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
            self._received += descriptors
            if not data:
                raise ChaperoneUnreachable("the chaperone closed the connection", object=self._path)
        if isinstance(message, Failed):
            raise _error(message)
        return message if isinstance(message, Answer) else None

    def _unreachable(self, error: OSError) -> ChaperoneUnreachable:
        what = "it does not answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return ChaperoneUnreachable(what, object=self._path)


def _name(target: Target) -> str:
    return "" if isinstance(target, socket.socket) else str(target)


def _error(failed: Failed) -> TcpmigError:
    cls = catalogue().get(failed.code, TcpmigError)
    return cls(failed.message, object=failed.object, fix=failed.fix or None)
