"""Every socket option of a TCP connection: readable ones are known, and a connection takes its own value back."""

import errno
import socket

import pytest

from tcpstate import options
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP
from tcpstate.options import Stage
from tests.kernel.tcp_rebuild.moved import V4, V6, attempt


@pytest.mark.parametrize("family", [V4, V6])
def test_every_readable_option_is_in_the_table_or_excluded_with_a_reason(family):
    """On a younger kernel this names the options that the table lacks."""
    loopback = "127.0.0.1" if family == V4 else "::1"
    with socket.socket(family, socket.SOCK_STREAM) as listener, socket.socket(family, socket.SOCK_STREAM) as client:
        listener.bind((loopback, 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        served, _ = listener.accept()
        known = {(o.level, o.number) for o in options.TABLE} | set(options.EXCLUDED)
        unknown = []
        levels = [(Level.SOCKET, 90), (Level.IP, 60), (Level.TCP, 60)] + ([(Level.IPV6, 90)] if family == V6 else [])
        for level, last in levels:
            for number in range(1, last):
                if (level, number) in known or (level, number) in READ_ONLY:
                    continue
                try:
                    value = served.getsockopt(level, number, 256)
                    served.setsockopt(level, number, value)
                except OSError:
                    continue
                unknown.append((level.name, number))
        served.close()
    assert unknown == []


#: takes back what it gave, but holds no state of the application's
READ_ONLY = {
    (Level.TCP, TCP.REPAIR): "",
    (Level.TCP, 20): "TCP_REPAIR_QUEUE",
    (Level.TCP, 35): "TCP_ZEROCOPY_RECEIVE",
}


@pytest.mark.parametrize("option", options.TABLE, ids=lambda o: o.keyword)
def test_a_connected_socket_takes_its_own_value_back(option):
    """Except what must be set before bind, every option of the table that it gives out it takes back."""
    family = V6 if option.where is options.Where.IPV6 else V4
    loopback = "127.0.0.1" if family == V4 else "::1"
    with socket.socket(family, socket.SOCK_STREAM) as listener, socket.socket(family, socket.SOCK_STREAM) as client:
        listener.bind((loopback, 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        failure, value = attempt(lambda: client.getsockopt(option.level, option.number, option.size))
        if failure:
            assert failure in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
        elif option.stage is not Stage.BEFORE_CONNECT:
            failure, _ = attempt(lambda: client.setsockopt(option.level, option.number, value))
            # reserved memory takes a memory cgroup that counts sockets' memory
            assert failure == 0 or (option.number, failure) == (SO.RESERVE_MEM, errno.EOPNOTSUPP)
            assert client.getsockopt(option.level, option.number, option.size) == value
