"""What arrived in a stop before the freeze: only data that the kernel had no room for comes again."""

from types import SimpleNamespace

from tcpstate.capture import unknown
from tcpstate.connid import ConnId
from tcpstate.segment import Flag, Segment

RECORD = SimpleNamespace(conn_id=ConnId.tcp("10.0.0.5", 2000, "10.0.0.9", 179), rcv_nxt=0xFFFFFFFE, scope="")


def segment(seq, payload=b"data", port=2000):
    ends = {"source": "10.0.0.9", "source_port": 179, "destination": "10.0.0.5", "destination_port": port}
    return Segment(**ends, seq=seq, ack=2, flags=Flag.ACK, window=3, payload=payload)


def test_data_beyond_what_was_received():
    had, partly, refused = segment(0xFFFFFFFA), segment(0xFFFFFFFC), segment(2)
    assert unknown([had, partly, refused], [RECORD]) == [partly, refused]


def test_neither_acknowledgements_nor_other_connections():
    assert unknown([segment(2, b""), segment(2, port=2001)], [RECORD]) == []
