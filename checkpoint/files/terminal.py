"""The kernel's interface to pseudo terminals: what is asked of them, and set.

Asked through the master, most of it is the slave's (drivers/tty/tty_io.c: ``real_tty``). Calls raise OSError.
Sources: include/uapi/asm-generic/ioctls.h, termbits.h of Linux 6.18; TIOCGPTPEER since 4.13.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from typing import ClassVar, Final, Self

from tcpstate.slotted import dataclass

__all__ = [
    "PTMX",
    "Pair",
    "Terminal",
    "Termios",
    "TtyCall",
    "give_word",
    "number_of",
    "open_pair",
    "open_slave",
    "slave_number",
    "word",
]

#: major numbers of the slaves; each has 2**20 minor ones
_FIRST_MAJOR, _LAST_MAJOR = 136, 143
_MINORS: Final = 1 << 20
#: what is opened for a new pseudo terminal of the host
PTMX: Final = "/dev/ptmx"
#: pairs that are opened, at most, to come to a wanted number
_MOST_OPENED: Final = 4096
_WORD: Final = struct.Struct("<i")


class TtyCall(enum.IntEnum):
    """Requests of ioctl(2) (asm-generic/ioctls.h)."""

    TCXONC = 0x540A
    TIOCEXCL = 0x540C
    TIOCSCTTY = 0x540E
    TIOCGPGRP = 0x540F
    TIOCSPGRP = 0x5410
    TIOCGWINSZ = 0x5413
    TIOCSWINSZ = 0x5414
    TIOCPKT = 0x5420
    TIOCGETD = 0x5424
    TIOCGSID = 0x5429
    TIOCGPTPEER = 0x5441
    TIOCSPTLCK = 0x40045431
    TCSETS2 = 0x402C542B
    TCGETS2 = 0x802C542A
    TIOCGDEV = 0x80045432
    TIOCGPKT = 0x80045438
    TIOCGPTLCK = 0x80045439
    TIOCGEXCL = 0x80045440


class LocalFlag(enum.IntFlag):
    """``c_lflag`` (asm-generic/termbits.h)."""

    ICANON = 0o2
    ECHO = 0o10


class InputFlag(enum.IntFlag):
    """``c_iflag``."""

    IXON = 0o2000


class OutputFlag(enum.IntFlag):
    """``c_oflag``."""

    OPOST = 0o1


class Control(enum.IntEnum):
    """Places in ``c_cc``."""

    ERASE = 2
    EOF = 4
    MIN = 6
    START = 8
    STOP = 9


_TCOON: Final = 1
_CONTROLS: Final = 19
_MARK: Final = ord("x")
#: milliseconds in which an echo comes, unless output is stopped
_PATIENCE: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Termios:
    """struct termios2: the modes of a terminal."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct(f"<4IB{_CONTROLS}s2I")

    input: int
    output: int
    control: int
    local: int
    line: int
    characters: bytes
    input_speed: int
    output_speed: int

    def __post_init__(self) -> None:
        words = (self.input, self.output, self.control, self.local, self.input_speed, self.output_speed)
        if len(self.characters) != _CONTROLS or not all(0 <= word < 1 << 32 for word in words) or self.line:
            raise ValueError("modes of a terminal out of range")

    @classmethod
    def of(cls, fd: int) -> Self:
        """Those of the pair that ``fd`` is an end of."""
        data = fcntl.ioctl(fd, TtyCall.TCGETS2, bytes(cls.FORMAT.size))
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**dict(zip(names, cls.FORMAT.unpack(data), strict=True)))

    def give(self, fd: int) -> None:
        """Set them, at once and without a flush."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        fcntl.ioctl(fd, TtyCall.TCSETS2, self.FORMAT.pack(*fields))

    @property
    def lines(self) -> bool:
        """Whether input is given out in lines."""
        return bool(self.local & LocalFlag.ICANON)

    def plain(self, *, lines: bool, end: int = 0, erase: int = 0) -> Termios:
        """Modes in which bytes pass as they are: no signals, nothing translated, and what is typed is echoed likewise.

        lines  input is given out in lines, the character ``end`` ends one without being part of it, and ``erase``
               takes back the one before it

        IXON stays: to clear it would start output that the user has stopped.
        """
        characters = bytearray(_CONTROLS)
        characters[Control.MIN] = 1
        if self.input & InputFlag.IXON:
            for which in (Control.START, Control.STOP):
                characters[which] = self.characters[which]
        if lines:
            characters[Control.EOF], characters[Control.ERASE] = end, erase
        return dataclasses.replace(
            self,
            input=self.input & InputFlag.IXON,
            output=self.output & ~OutputFlag.OPOST,
            local=LocalFlag.ECHO | (LocalFlag.ICANON if lines else 0),
            characters=bytes(characters),
        )


def number_of(fd: int) -> int | None:
    """N of the /dev/pts/N that is this file, its other end, or behind this /dev/tty; None if it is something else."""
    try:
        (device,) = _WORD.unpack(fcntl.ioctl(fd, TtyCall.TIOCGDEV, bytes(4)))
    except OSError:
        return None
    return slave_number(device)


def slave_number(device: int) -> int | None:
    """N of the /dev/pts/N with this device number, as the kernel gives it (new_encode_dev); None for other devices."""
    # minor bits below and above the major ones
    major, minor = device >> 8 & 0xFFF, device & 0xFF | (device >> 12 & 0xFFF00)
    if not _FIRST_MAJOR <= major <= _LAST_MAJOR:
        return None
    return (major - _FIRST_MAJOR) * _MINORS + minor


def word(fd: int, request: TtyCall) -> int:
    """The int that a request gives."""
    return int(_WORD.unpack(fcntl.ioctl(fd, request, bytes(4)))[0])


def give_word(fd: int, request: TtyCall, value: int) -> None:
    """Set by a pointer to an int."""
    fcntl.ioctl(fd, request, _WORD.pack(value))


def open_slave(master: int, flags: int) -> int:
    """A new description of the slave, whatever its path is; never as controlling terminal."""
    # unlike open(2) it would keep O_CLOEXEC among the flags of the description, and fdinfo would show it for ever
    fd = fcntl.ioctl(master, TtyCall.TIOCGPTPEER, flags | os.O_NOCTTY)
    os.set_inheritable(fd, False)
    return fd


@dataclass(frozen=True, slots=True)
class Pair:
    """A pseudo terminal of ours that was opened before its files are made: it is already somebody's controlling
    terminal.

    master, slave  our descriptors
    """

    master: int
    slave: int

    def close(self) -> None:
        """Give both up."""
        os.close(self.slave)
        os.close(self.master)


def open_pair(number: int, warn: Callable[[str], None], ptmx: str = PTMX) -> int:
    """A new master, unlocked; that of /dev/pts/``number`` unless that is taken, which is told. ``ptmx``: what is opened
    for it, where a tree has pseudo terminals of its own."""
    opened: list[int] = []
    try:
        while True:
            fd = os.open(ptmx, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            opened.append(fd)
            here = number_of(fd)
            # the kernel gives the lowest free one
            if here == number or here is None or here > number or len(opened) > _MOST_OPENED:
                break
        if here != number:
            fd, here = opened[0], number_of(opened[0])
            warn(f"/dev/pts/{number} is taken here: that terminal is /dev/pts/{here} now")
        opened.remove(fd)
        give_word(fd, TtyCall.TIOCSPTLCK, 0)
        return fd
    finally:
        for extra in opened:
            os.close(extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """What waits in a pseudo terminal to be read.

    output  written by the slave, or echoed, for the master
    lines   written by the master: finished lines, in canonical mode
    rest    written by the master: the line that is being typed, or, in another mode, everything
    """

    output: bytes = b""
    lines: tuple[bytes, ...] = ()
    rest: bytes = b""

    @classmethod
    def take(cls, master: int, slave: int) -> Self:
        """Read all of it, and put it back. ``slave``: a description of ours, non-blocking.

        A terminal cannot be peeked. Nobody else may use it meanwhile.
        """
        modes = Termios.of(master)
        packets = word(master, TtyCall.TIOCGPKT)
        if packets:
            give_word(master, TtyCall.TIOCPKT, 0)
        try:
            lines: list[bytes] = []
            while modes.lines and (line := _read(slave)) is not None:
                lines.append(line)
            # the line that is being typed is only given out in another mode; all before it was taken in its own
            modes.plain(lines=False).give(master)
            rest = _all_of(slave)
            found = cls(output=_all_of(master), lines=tuple(lines), rest=rest)
            found.put(master, slave, modes)
        finally:
            modes.give(master)
            if packets:
                give_word(master, TtyCall.TIOCPKT, 1)
        return found

    def put(self, master: int, slave: int, modes: Termios) -> None:
        """Let it wait in a terminal whose queues are empty, and give that the modes."""
        used = {byte for line in (*self.lines, self.rest) for byte in line}
        erase, end = ([byte for byte in range(1, 256) if byte not in used] + [0xFE, 0xFF])[:2]
        echoing = modes.plain(lines=modes.lines, end=end, erase=erase)
        echoing.give(master)
        for line in self.lines:
            _write(master, line if line.endswith(b"\n") else line + bytes([end]))
            _hear(master, len(line))
        _write(master, self.rest)
        _hear(master, len(self.rest))
        if modes.lines and self.lines:
            # an end of file is not echoed: a character and its erasure behind it are
            _write(master, bytes([_MARK, erase]))
            _hear(master, 2)
        if self.output and not _write(slave, self.output):
            # output was stopped from the keyboard: it goes on
            fcntl.ioctl(slave, TtyCall.TCXONC, _TCOON)
            _write(slave, self.output)
        modes.give(master)


def _hear(master: int, count: int) -> None:
    """Read so many echoed bytes: then what was written has been taken in, in the modes of now. The kernel does that in
    its own time (flush_to_ldisc), and would do it in other modes after a change."""
    poll = select.poll()
    poll.register(master, select.POLLIN)
    while count > 0 and poll.poll(_PATIENCE):
        count -= len(os.read(master, count))


def _read(fd: int) -> bytes | None:
    """One read; None if nothing waits. A poll brings what is on its way (n_tty_poll, tty_buffer_flush_work)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not any(events & select.POLLIN for _, events in poll.poll(0)):
        return None
    try:
        return os.read(fd, 1 << 16)
    except OSError as error:
        # EIO: the other end is closed, and all has been read
        if error.errno in (errno.EAGAIN, errno.EIO):
            return None
        raise


def _all_of(fd: int) -> bytes:
    parts = []
    while part := _read(fd):
        parts.append(part)
    return b"".join(parts)


def _write(fd: int, data: bytes) -> bool:
    """Write all; False if nothing could be written at first."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    view = memoryview(data)
    while view:
        if not any(events & select.POLLOUT for _, events in poll.poll(0 if len(view) == len(data) else 1000)):
            return False
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            return False
    return True
