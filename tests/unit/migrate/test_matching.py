"""Which trees move together."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import matching
from migrate.matching import Root, groups, together
from tcpstate.kernel.tcp import TcpState
from tcpstate.locate import Owner


def test_trees_with_something_in_common_are_one_group() -> None:
    assert groups({5: {"a"}, 3: {"b"}, 9: {"a", "c"}, 4: set(), 7: {"c"}}) == [(3,), (4,), (5, 7, 9)]


def test_a_tree_that_has_something_of_two_groups_joins_them() -> None:
    assert groups({1: {"a"}, 2: {"b"}, 3: {"a", "b"}}) == [(1, 2, 3)]


@given(st.dictionaries(st.integers(2, 40), st.sets(st.integers(0, 12), max_size=3), max_size=15))
def test_every_tree_is_in_one_group_and_no_two_groups_share(ties: dict[int, set[int]]) -> None:
    found = groups(ties)
    assert sorted(pid for group in found for pid in group) == sorted(ties)
    held = [set().union(*(ties[pid] for pid in group)) for group in found]
    assert all(not (a & b) for i, a in enumerate(held) for b in held[i + 1 :])
    for group in found:
        # nobody is in a group without a reason
        reached = {group[0]}
        while more := {p for p in group if p not in reached and any(ties[p] & ties[q] for q in reached)}:
            reached |= more
        assert reached == set(group)


def test_each_address_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    established = TcpState.ESTABLISHED
    socks = [
        SimpleNamespace(
            inode=n, state=established, local=f"10.0.0.{n % 2}", local_port=7, peer=f"10.0.1.{n % 3}", peer_port=n
        )
        for n in range(600)
    ]
    asked = []
    monkeypatch.setattr(matching, "owners_of", lambda pids: {n: [Owner(10 + n % 2, n)] for n in range(600)})
    monkeypatch.setattr(matching.diag, "dump", lambda _: iter(socks))
    monkeypatch.setattr(matching, "is_local", lambda address: asked.append(address))
    roots = [Root(pid=pid, command="", members=(pid,)) for pid in (10, 11)]
    assert together(roots, address="auto") == [(10,), (11,)]
    assert sorted(asked) == ["10.0.1.0", "10.0.1.1", "10.0.1.2"]
