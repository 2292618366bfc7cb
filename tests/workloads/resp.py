"""Redis's protocol, version 2, sans-IO: commands out, replies in. Source: redis.io, "RESP protocol spec"."""

from __future__ import annotations

__all__ = ["RespError", "RespReader", "command"]


class RespError(str):
    """An error reply (``-ERR ...``), as a value: the client compares it with what it expected."""

    __slots__ = ()


def command(*words: bytes) -> bytes:
    """One command as bytes."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class RespReader:
    """Bytes in, replies out; whatever pieces the bytes come in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a reply that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes | int | str | RespError | None]:
        """The replies that are complete now. Raises ValueError on anything that is no reply."""
        self._buffer += data
        buffer, at, replies = self._buffer, 0, []
        while (end := buffer.find(b"\r\n", at)) >= 0:
            kind, line = buffer[at : at + 1], bytes(buffer[at + 1 : end])
            reply: bytes | int | str | RespError | None
            if kind == b"$":
                length = int(line)
                if length >= 0:
                    if len(buffer) < end + 2 + length + 2:
                        break
                    reply = bytes(buffer[end + 2 : end + 2 + length])
                    if buffer[end + 2 + length : end + 4 + length] != b"\r\n":
                        raise ValueError(f"no end of line after a value of {length} bytes")
                    end += length + 2
                else:
                    reply = None
            elif kind == b":":
                reply = int(line)
            elif kind == b"+":
                reply = line.decode()
            elif kind == b"-":
                reply = RespError(line.decode())
            else:
                raise ValueError(f"a reply that begins with {bytes(kind)!r}")
            replies.append(reply)
            at = end + 2
        del buffer[:at]
        return replies
