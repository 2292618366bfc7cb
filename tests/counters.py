"""The kernel's own counters of a test host: what nstat shows, as a difference between two moments."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.hosts.host import Host

__all__ = ["INTERESTING", "counters", "moved"]

# What tells of trouble, or explains it. Linux net/ipv4/proc.c.
INTERESTING = (
    "TcpExtTCPTimeouts",  # a retransmission timer ran out: the figure that is judged
    "TcpExtTCPLossProbes",
    "TcpExtTCPSpuriousRTOs",
    "TcpExtTCPLostRetransmit",
    "TcpExtTCPFastRetrans",
    "TcpExtTCPSACKReneging",  # what was told by SACK as arrived was forgotten: the peer ends its recovery by a time-out
    "TcpExtTCPOFOQueue",
    "TcpExtTCPSynRetrans",
    "TcpExtTCPAbortOnTimeout",
    "TcpExtTCPAbortOnData",
    "TcpExtTCPAbortOnClose",
    "TcpExtPAWSEstab",
    "TcpExtTCPChallengeACK",
    "TcpExtTCPDSACKRecv",
    "TcpExtListenDrops",
    "TcpExtTCPBacklogDrop",
    "TcpExtTCPRcvQDrop",
    "TcpExtTCPZeroWindowDrop",
    "TcpExtTCPOFODrop",
    "TcpExtTCPRcvCollapsed",
    "TcpExtPruneCalled",
    "TcpExtRcvPruned",
    "TcpExtOfoPruned",
    "TcpRetransSegs",
    "TcpAttemptFails",
    "TcpEstabResets",
    "TcpOutRsts",
    "TcpInErrs",
    "TcpInCsumErrors",
)


def counters(host: Host) -> Counter[str]:
    """All counters of the host's network: ``TcpExtTCPTimeouts``, ``TcpOutRsts``, ..."""
    found: Counter[str] = Counter()
    for name in ("netstat", "snmp"):
        lines = Path(f"/proc/{host.init}/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            group, *keys = names.split()
            prefix = group.rstrip(":")
            found.update({prefix + key: int(value) for key, value in zip(keys, values.split()[1:], strict=True)})
    return found


def moved(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Those of `INTERESTING` that changed, with their growth."""
    return {name: after[name] - before[name] for name in INTERESTING if after[name] != before[name]}
