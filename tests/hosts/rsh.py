"""Run a command in another test host, as rsh and ssh do: ``tcpmig migrate --rsh "python -IS .../rsh.py" PID target``.

    rsh.py [--relay] [--warm] HOST COMMAND...

Run inside a host.  The init of HOST starts the command with our stdin, stdout and stderr (passed as descriptors, so
that nothing stands in the way of the bytes) and tells its exit status, which becomes ours; 255 as with ssh if that host
is not there.  With --relay the bytes go through this process, as they do through ssh: when it is killed, the line is
cut and the command reads an end of file.  With --warm the command, `python -m MODULE ...`, is forked from the host's
warm Python (tests.hosts.warm) instead.

Only modules that are built in or imported at start anyway: it must be there within a few milliseconds.
"""

from __future__ import annotations

import _socket
import _thread
import os
import sys

UNREACHABLE = 255  # exit status of ssh when it could not reach the host
SPLICE = 1 << 20
# As in tests.hosts.wire, which is not imported: that costs more than all the rest here.
SHELL, STARTED, EXIT, FAILED, MAX_MESSAGE = b"S", b"pid ", b"exit ", b"error ", 128 << 10


def main(arguments: list[str]) -> int:
    """The command's exit status."""
    options = []
    while arguments[:1] in (["--relay"], ["--warm"]):
        options.append(arguments.pop(0))
    relay = "--relay" in options
    if len(arguments) < 2:
        print("usage: rsh.py [--relay] [--warm] HOST COMMAND...", file=sys.stderr)
        return 2
    host = arguments[0].rpartition("@")[2]
    path = f"{os.environ.get('TMH_DIR', '')}/{host}{'.warm' * ('--warm' in options)}.sock"
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except OSError as error:
        print(f"rsh: {host} cannot be reached: {error.strerror} ({path})", file=sys.stderr)
        return UNREACHABLE
    ends = [0, 1, 2]
    if relay:
        from_line, into_line = os.pipe()
        from_command, into_command = os.pipe()
        ends = [from_line, into_command, 2]
    rights = b"".join(end.to_bytes(4, sys.byteorder) for end in ends)
    command = os.fsencode(" ".join(arguments[1:]))  # joined and split again on the other side, as ssh does
    connection.sendmsg([SHELL + command], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    if relay:
        os.close(from_line)
        os.close(into_command)
        _thread.start_new_thread(_pump, (0, into_line))
        answer = connection.recv(MAX_MESSAGE)
        _pump(from_command, 1)
    else:
        # The command alone shall hold the ends of the line now: their end is its end.
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        answer = connection.recv(MAX_MESSAGE)
    while answer.startswith(STARTED):
        answer = connection.recv(MAX_MESSAGE)
    if answer.startswith(EXIT):
        status = int(answer[len(EXIT) :])
        return status if status >= 0 else 128 - status
    print(f"rsh: {host}: {answer.decode(errors='replace') or 'the host is gone'}", file=sys.stderr)
    return 127 if answer.startswith(FAILED) else UNREACHABLE


def _pump(source: int, sink: int) -> None:
    try:
        while os.splice(source, sink, SPLICE):
            continue
    except BrokenPipeError:
        return  # the reader has ended: its exit status says the rest
    finally:
        os.close(sink)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
