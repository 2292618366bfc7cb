"""TCP MD5 signatures: which key is for whom, what a signed segment looks like, and that no key is ever shown."""

import dataclasses
import json
import logging

import pytest

from checkpoint.image.inspect import printable
from tcpstate import codec
from tcpstate.errors import BadRecord
from tcpstate.kernel import md5sig
from tcpstate.md5keys import SigningKey, key_for, signed
from tcpstate.segment import Flag, Segment

SECRET = b"the-secret-of-the-peers"


def key(address="10.0.0.9", prefix=32, secret=SECRET):
    return SigningKey(address=address, prefix=prefix, secret=secret)


def segment(**values):
    ends = {"source": "10.0.0.9", "source_port": 179, "destination": "10.0.0.5", "destination_port": 2000}
    return Segment(**ends, seq=1, ack=2, flags=Flag.ACK, window=3, payload=b"data", **values)


def test_the_key_of_the_longest_prefix_counts():
    wide, narrow = key("10.0.0.0", 8), key(secret=b"other")
    assert key_for([wide, narrow], "10.0.0.9") is narrow
    assert key_for([wide, narrow], "10.1.2.3") is wide
    assert key_for([wide, narrow], "11.0.0.1") is None
    assert key_for([key("::", 0)], "10.0.0.9") is None
    assert key_for([key("fe80::", 10)], "fe80::1%eth0") is not None


def test_a_segment_is_signed_behind_its_options():
    # RFC 2385 2.0, computed by hand: pseudo-header, header without options and checksum, data, key
    import hashlib
    import socket
    import struct

    plain = segment(options=bytes((1, 1, 1, 0)))
    found = signed(plain, [key()])
    kinds = [kind for kind, _ in dataclasses.replace(found, options=found.options[4:]).each_option()]
    assert found.options[:4] == plain.options
    assert kinds == [md5sig.OPTION_KIND]
    ends = socket.inet_aton("10.0.0.9") + socket.inet_aton("10.0.0.5")
    pseudo = ends + struct.pack("!HH", 6, 20 + 24 + 4)
    header = struct.pack("!HHIIBBHHH", 179, 2000, 1, 2, (20 + 24) // 4 << 4, Flag.ACK, 3, 0, 0)
    assert found.options[-16:] == hashlib.md5(pseudo + header + b"data" + SECRET).digest()


def test_nobody_elses_segment_is_signed():
    assert signed(segment(), [key("10.0.0.8")]) == segment()


@pytest.mark.parametrize(
    "values",
    [{"address": "10.0.0.09"}, {"prefix": 33}, {"secret": b""}, {"secret": bytes(81)}, {"address": "fe80::1%1"}],
)
def test_impossible_keys_are_refused(values):
    plain = {"address": "10.0.0.9", "prefix": 32, "secret": SECRET} | values
    with pytest.raises(BadRecord) as refused:
        codec.from_plain(SigningKey, plain)
    assert SECRET.decode() not in str(refused.value)


def test_no_key_is_shown(caplog):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("t").warning("%s %r", key(), [key()])
        told = caplog.text + repr({"keys": (key(),)}) + str(key()) + json.dumps(printable(codec.to_plain(key())))
    assert "10.0.0.9" in told
    assert SECRET.decode() not in told
    assert SECRET.hex() not in told
    assert "not shown (23 bytes)" in told
