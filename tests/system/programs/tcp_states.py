"""A process with TCP sockets in states without a living connection. After "go" it looks at what has become of them.

Arguments: service address, peer's address, directory for the files "ready", "go" and "report".
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time

service, peer, directory = sys.argv[1:]
REFUSED, SILENT, BLOCKING = 7101, 7102, 7103


def fresh(port=0):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((service, port))
    return sock


def connecting(port):
    sock = fresh()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect((peer, port))
    return sock


def ended(sock):
    poll = select.poll()
    poll.register(sock, 0)
    while not poll.poll(1000):
        pass


def outcome(sock):
    """What a program does that waits for a connect() to end."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    events = poll.poll(20000)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events else "never"


listener = fresh(7000)
listener.listen(37)
bound = fresh(7999)
reset, _ = listener.accept()
finished, _ = listener.accept()
finished.shutdown(socket.SHUT_WR)
refused = connecting(REFUSED)
ended(refused)
ended(reset)
ended(finished)
silent = connecting(SILENT)
waited = []


def wait():
    with fresh() as sock:
        try:
            sock.connect((peer, BLOCKING))
            sock.sendall(b"blocking")
            waited.append(sock.recv(99).decode())
        except OSError as error:
            waited.append(repr(error))


thread = threading.Thread(target=wait)
thread.start()
while "syn_sent" not in os.popen(f"ss -Htn state syn-sent dst {peer} dport = {BLOCKING} | sed s/^/syn_sent/").read():
    time.sleep(0.01)
open(f"{directory}/ready", "w").close()
while not os.path.exists(f"{directory}/go"):
    time.sleep(0.01)

report = {"reset": [reset.recv(99).decode(), reset.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), len(reset.recv(1))]}
report["finished"] = [finished.recv(99).decode(), len(finished.recv(1)), finished.getsockopt(1, socket.SO_ERROR)]
report["refused"] = outcome(refused)
report["silent"] = outcome(silent)
silent.setblocking(True)
silent.sendall(b"hello")
report["answer"] = silent.recv(99).decode()
thread.join()
report["blocking"] = waited
report["bound"] = bound.getsockname()
bound.listen()
report["backlog"] = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[28]
with open(f"{directory}/part", "w") as file:
    json.dump(report, file)
os.rename(f"{directory}/part", f"{directory}/report")
time.sleep(1000)
