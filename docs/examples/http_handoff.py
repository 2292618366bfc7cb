"""Two HTTP servers pass their live connections from host to host: unprivileged, through the chaperone of each host.

On both hosts, as an ordinary user::

    python http_handoff.py --listen 8080 --control 8081 --to OTHER:8081

and as root ``tcpmig chaperone`` (there with ``--address`` of the service).  SIGUSR1 to the one that serves: every
connection goes to the other, in the middle of a download or between two requests, and its clients notice nothing.  The
service's address is moved by whoever may (keepalived, an operator) once the other server says ``built``.

What makes it short is that this program knows its own connections: it comes to rest between two writes, and passes on
what it knows (what is being sent, how far it is, what of a request has come) beside the connection's record.

::

    here                                             there
    come to rest
    "hand over"                               ->
                                              <-     "go": its clock runs from here, so that no time is missed
    freeze, export each connection; records   ->     rebuild each; elapsed = since "go"
                                              <-     "built"
                                                     release each, once the address is here
    discard each                              <-     "alive"
    (or, if anything goes wrong: resume each, and serve on)
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tcpstate.chaperone.client import Chaperone
from tcpstate.errors import AddressNotMoved, TcpmigError

CHUNK = 32 << 10
PAUSE = 0.02  # seconds between two chunks: downloads shall last
RECORD_MAX = 64 << 20  # bytes of a line between the servers


def content(start: int, end: int) -> bytes:
    """Bytes start to end of what every download is made of; the same on every host."""
    first = start // 32
    blocks = (hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(first, (end + 31) // 32))
    return b"".join(blocks)[start - 32 * first : end - 32 * first]


@dataclass
class Connection:
    """What the server knows of one connection: beside its record, all that another one needs to go on.

    buffer   what has come of the next request
    head     what is still to be sent of a response's head
    at, end  what is still to be sent of a download
    """

    buffer: str = ""
    head: str = ""
    at: int = 0
    end: int = 0


@dataclass
class Server:
    """One of the two."""

    name: str
    to: tuple[str, int]
    connections: dict[socket.socket, Connection] = field(default_factory=dict)
    tasks: dict[socket.socket, asyncio.Task[None]] = field(default_factory=dict)
    wakes: dict[socket.socket, asyncio.Event] = field(default_factory=dict)
    late: list[socket.socket] = field(default_factory=list)
    resting: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- HTTP

    def serve(self, sock: socket.socket, connection: Connection) -> None:
        """Go on with a connection, new or not."""
        sock.setblocking(False)
        self.connections[sock] = connection
        self.tasks[sock] = asyncio.create_task(self.talk(sock, connection))

    async def talk(self, sock: socket.socket, connection: Connection) -> None:
        """Answer requests until the client has enough, or until the server comes to rest."""
        loop = asyncio.get_running_loop()
        try:
            while not self.resting.is_set():
                if connection.head or connection.at < connection.end:
                    # A write once begun is finished: between two writes everything is either in `connection` or in the
                    # connection's send queue.
                    piece = content(connection.at, min(connection.end, connection.at + CHUNK))
                    head, connection.head = connection.head.encode(), ""
                    await loop.sock_sendall(sock, head + piece)
                    connection.at += len(piece)
                    await asyncio.sleep(PAUSE)
                elif "\r\n\r\n" in connection.buffer:
                    request, _, connection.buffer = connection.buffer.partition("\r\n\r\n")
                    self.answer(request, connection)
                else:
                    await self.readable(sock)
                    try:
                        data = sock.recv(CHUNK)
                    except BlockingIOError:
                        continue
                    if not data:
                        break
                    connection.buffer += data.decode("latin-1")
        except ConnectionError as error:
            print(f"a client is gone: {error}", flush=True)
        if not self.resting.is_set():
            self.forget(sock)

    async def readable(self, sock: socket.socket) -> None:
        """Until something has come, or the server comes to rest. Cancelling sock_recv() could lose what it has read."""
        loop, wake = asyncio.get_running_loop(), self.wakes.setdefault(sock, asyncio.Event())
        loop.add_reader(sock, wake.set)
        await wake.wait()
        wake.clear()
        loop.remove_reader(sock)

    def answer(self, request: str, connection: Connection) -> None:
        """GET /bytes/COUNT is a download, anything else is told who serves."""
        path = request.split(" ")[1] if request.count(" ") >= 2 else "/"
        kind, _, count = path.removeprefix("/").partition("/")
        if kind == "bytes" and count.isdigit():
            connection.at, connection.end, body = 0, int(count), ""
            length = connection.end
        else:
            body = f"this is {self.name}\n"
            length = len(body)
        connection.head = f"HTTP/1.1 200 OK\r\nServer: {self.name}\r\nContent-Length: {length}\r\n\r\n{body}"

    def forget(self, sock: socket.socket) -> None:
        """The connection is over."""
        del self.connections[sock], self.tasks[sock]
        self.wakes.pop(sock, None)
        sock.close()

    async def accept(self, listener: socket.socket) -> None:
        """New connections, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if self.resting.is_set():
                # too late for this hand-over; if it comes about, the client has to connect again
                self.late.append(sock)
            else:
                self.serve(sock, Connection())

    # ---- giving

    async def rest(self) -> None:
        """Until no connection is in the middle of a write."""
        self.resting.set()
        for wake in self.wakes.values():
            wake.set()
        await asyncio.gather(*self.tasks.values())
        self.tasks.clear()
        self.wakes.clear()

    async def hand_over(self) -> None:
        """All connections to the other server; they stay here if that fails."""
        await self.rest()
        with Chaperone() as chaperone:
            try:
                reader, writer = await asyncio.open_connection(*self.to, limit=RECORD_MAX)
                writer.write(b"hand over\n")
                await expect(reader, "go")
                for sock, connection in self.connections.items():
                    chaperone.freeze(sock)
                    record = base64.b64encode(chaperone.export(sock)).decode()
                    writer.write(json.dumps({"record": record, "state": asdict(connection)}).encode() + b"\n")
                writer.write(b"{}\n")
                await expect(reader, "built")
                print("built there: the address may move", flush=True)
                await expect(reader, "alive")
            except (OSError, TcpmigError, asyncio.IncompleteReadError, ValueError) as error:
                print(f"not handed over: {error}", flush=True)
                self.serve_on(chaperone)
                return
            for sock in list(self.connections):
                chaperone.discard(sock)
                sock.close()
            self.connections.clear()
            while self.late:
                self.late.pop().close()
            self.resting.clear()
            writer.close()
        print("handed over", flush=True)

    def serve_on(self, chaperone: Chaperone) -> None:
        """As if nothing had been."""
        self.resting.clear()
        for sock, connection in self.connections.items():
            with contextlib.suppress(TcpmigError):  # those that were not frozen yet
                chaperone.resume(sock)
            self.serve(sock, connection)
        while self.late:
            self.serve(self.late.pop(), Connection())

    # ---- taking

    async def take_over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connections of the other server."""
        await expect(reader, "hand over")
        begun = time.monotonic()
        writer.write(b"go\n")
        with Chaperone() as chaperone:
            built: list[tuple[Any, Connection]] = []
            while told := json.loads(await reader.readuntil()):
                record = base64.b64decode(told["record"])
                conn_id = chaperone.rebuild(record, elapsed=time.monotonic() - begun)
                built.append((conn_id, Connection(**told["state"])))
            print("built", flush=True)
            writer.write(b"built\n")
            for conn_id, connection in built:
                self.serve(await released(chaperone, conn_id), connection)
            writer.write(b"alive\n")
        print(f"took over {len(built)}", flush=True)
        await writer.drain()
        writer.close()


async def released(chaperone: Chaperone, conn_id: Any) -> socket.socket:
    """The socket of a rebuilt connection, as soon as its address is here."""
    while True:
        try:
            return chaperone.release(conn_id)
        except AddressNotMoved:
            await asyncio.sleep(0.005)


async def expect(reader: asyncio.StreamReader, word: str) -> None:
    """The next line is this; ValueError."""
    line = (await reader.readuntil()).decode().strip()
    if line != word:
        raise ValueError(f"expected {word!r}, heard {line!r}")


async def main() -> None:
    """Serve; hand over at every SIGUSR1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listen", type=int, required=True, metavar="PORT", help="of the service, on all addresses")
    parser.add_argument("--control", type=int, required=True, metavar="PORT", help="for the other server")
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="the other server's control port")
    options = parser.parse_args()
    host, _, port = options.to.rpartition(":")
    server = Server(socket.gethostname(), (host.strip("[]"), int(port)))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    listener = socket.create_server(("", options.listen), family=family, dualstack_ipv6=dual)
    listener.setblocking(False)
    control = await asyncio.start_server(server.take_over, port=options.control, limit=RECORD_MAX)
    loop = asyncio.get_running_loop()
    handing = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, handing.set)
    accepting = asyncio.create_task(server.accept(listener))
    print("ready", flush=True)
    async with control:
        while True:
            await handing.wait()
            handing.clear()
            await server.hand_over()
            if accepting.done():
                accepting.result()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
