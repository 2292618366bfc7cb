"""Which error a socket that has ended is given again."""

import pytest

from tcpstate.closed import nearest


@pytest.mark.parametrize(
    ("error", "established", "told"),
    [
        ("", True, ""),
        ("", False, ""),
        ("ECONNRESET", True, "ECONNRESET"),
        ("EPIPE", True, "EPIPE"),
        ("ETIMEDOUT", True, "ECONNRESET"),
        ("ECONNREFUSED", False, "ECONNREFUSED"),
        ("EHOSTUNREACH", False, "ECONNREFUSED"),
        ("ECONNRESET", False, "ECONNREFUSED"),
    ],
)
def test_the_nearest_error_that_can_be_set(error, established, told):
    assert nearest(error, established=established) == told
