"""Soft state: samples that teach the kernel's estimator, and limits for callers that nobody vouches for."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate.connid import ConnId
from tcpstate.record import SoftState
from tcpstate.roundtrip import SAMPLES_MAX, Lesson, _packet, samples
from tcpstate.segment import build, intact, parse
from tcpstate.softstate import clamp

SECOND = 1_000_000


def estimate(values):
    """(srtt, rttvar) after these samples, as net/ipv4/tcp_input.c tcp_rtt_estimator computes them, microseconds."""
    srtt = deviation = 0  # eighths, quarters
    for sample in values:
        m = sample
        if not srtt:
            srtt, deviation = m << 3, m << 1
            continue
        m -= srtt >> 3
        srtt += m
        if m < 0:
            m = -m - (deviation >> 2)
            m = m >> 3 if m > 0 else m
        else:
            m -= deviation >> 2
        deviation += m
    return srtt >> 3, deviation >> 2


@given(st.integers(100, 10 * SECOND), st.floats(0.16, 1.8))
def test_samples_lead_to_what_was_wanted(srtt, ratio):
    wanted = int(srtt * ratio)
    found, deviation = estimate(samples(srtt, wanted))
    assert abs(found - srtt) <= 2 + srtt // 500
    # less than three eighths of srtt is reached in steps of a quarter
    assert abs(deviation - wanted) <= 4 + 0.16 * wanted


@given(st.integers(0, 1 << 32), st.integers(0, 1 << 32), st.booleans())
def test_samples_are_few_positive_and_bounded(srtt, rttvar, exact):
    found = samples(srtt, rttvar, exact=exact)
    assert len(found) <= SAMPLES_MAX
    assert bool(found) == (srtt > 0)
    assert all(0 < one <= 120 * SECOND for one in found)


def test_one_sample_does_where_the_time_out_is_the_same_anyway():
    assert samples(37_000, 2_000, exact=False) == (37_000,)
    assert len(samples(37_000, 2_000)) == SAMPLES_MAX
    # 4 * 80 ms is more than the 200 ms that the kernel adds anyway
    assert len(samples(90_000, 80_000, exact=False)) == 2


@pytest.mark.parametrize("conn", ["tcp:10.0.0.1:80-192.168.7.9:40000", "tcp:[fd00::5]:6379-[fd00::9]:65535"])
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 120 * SECOND), st.sampled_from([1, 1000]))
def test_the_injected_packet_is_a_whole_segment_of_the_peer(conn, una, nxt, sample, unit):
    one = Lesson(conn_id=ConnId.parse(conn), snd_una=una, rcv_nxt=nxt, samples=(sample, sample))
    packet = _packet(one, 0, unit)
    segment = parse(packet)
    assert (segment.conn_id, segment.seq, segment.ack) == (one.conn_id, nxt, (una - 1) & 0xFFFFFFFF)
    assert segment.timestamps[0] == 0
    assert intact(packet)
    # A sum of nothing is written as 0 by one and as 0xFFFF by the other, and either is right (RFC 1071): when the
    # packet is made, the part that is the same for all of them has been summed up before.
    built, place = build(segment), (20 if packet[0] >> 4 == 4 else 40) + 16
    assert (built[:place], built[place + 2 :]) == (packet[:place], packet[place + 2 :])


SOFT = SoftState(cwnd=4000, ssthresh=300, srtt=50, rttvar=10, rto=200_000, min_rtt=40, pacing_rate=10**9)


@pytest.mark.parametrize(("mss", "segments"), [(1460, 10), (1220, 10), (536, 10), (8960, 2), (2190, 6), (40, 10)])
def test_nobody_begins_with_more_than_an_initial_window(mss, segments):
    # RFC 6928 2: min(10 * MSS, max(2 * MSS, 14600))
    assert clamp(SOFT, mss=mss).cwnd == segments
    assert clamp(dataclasses.replace(SOFT, cwnd=1), mss=mss).cwnd == 1


def test_a_time_out_below_a_second_is_not_taken_from_a_stranger():
    found = clamp(SOFT, mss=1460)
    assert (found.srtt, found.rttvar, found.min_rtt, found.pacing_rate) == (0, 0, None, None)
    assert (found.ssthresh, found.rto) == (300, SECOND)
    slow = dataclasses.replace(SOFT, srtt=700_000, rttvar=90_000, rto=1_060_000)
    found = clamp(slow, mss=1460)
    assert (found.srtt, found.rttvar, found.rto) == (700_000, 90_000, 1_060_000)


@given(st.builds(SoftState, *[st.none()] * 0, **{
    name: st.integers(0, 2**32 - 1) for name in ("cwnd", "ssthresh", "srtt", "rttvar", "rto")
}), st.integers(1, 65535))  # fmt: skip
def test_what_was_clamped_stays_as_it_is(soft, mss):
    once = clamp(soft, mss=mss)
    assert clamp(once, mss=mss) == once
    assert once.cwnd <= max(2, 14600 // mss) or mss < 1460
