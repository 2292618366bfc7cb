"""Records of user and cgroup namespaces: written, read, judged."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoint.errors import StateRefused
from checkpoint.namespaces.spaces import Spaces, unified
from checkpoint.namespaces.users import Extent, Users
from checkpoint.state.base import TaskBuilder
from checkpoint.state.cgroup import Cgroup, namespace_roots
from checkpoint.state.credentials import Capabilities, Credentials, Ids
from tcpstate.codec import pack, unpack

MAP = (Extent(0, 100000, 10), Extent(10, 7, 1))


def users(**changes: Any) -> Users:
    given: dict[str, Any] = {"uids": MAP, "gids": MAP, "setgroups": True, "owner": 1000, "groups": (1000, 4)}
    return Users(**given | changes)


def test_it_is_written_and_read() -> None:
    whole = Spaces(users=users(network=True), cgroups=(Cgroup("", "/a"), Cgroup("name=systemd", "/")))
    assert unpack(Spaces, pack(whole)) == whole
    assert unified(whole.cgroups) == "/a"
    assert unified(None) == "/"


@pytest.mark.parametrize(
    "changes",
    [
        {"uids": ()},
        {"gids": (Extent(0, 5, 3), Extent(2, 100, 1))},
        {"uids": (Extent(0, 5, 3), Extent(9, 7, 1))},
        {"gids": tuple(Extent(n, n, 1) for n in range(341))},
        {"owner": -1},
        {"groups": ((1 << 32) - 1,)},
    ],
)
def test_what_is_no_user_namespace(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"map|range"):
        users(**changes)


@pytest.mark.parametrize("extent", [(-1, 0, 1), (0, -1, 1), (0, 0, 0), (1, 0, (1 << 32) - 1), (0, 5, (1 << 32) - 5)])
def test_extents_out_of_range(extent: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Extent(*extent)


def test_ids_inside() -> None:
    assert [users().user(one) for one in (100000, 100009, 7)] == [0, 9, 10]
    assert [users().group(one) for one in (99999, 100010, 0)] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "ids", "lacking"),
    [
        ({}, ((100000,), (7,), (4, 1000)), ""),
        ({}, ((100000,), (7,), (100001,)), ""),
        ({}, ((100000,), (7,), (100001, 4)), "supplementary group 4 is not"),
        ({}, ((0,), (7,), ()), "user ID 0"),
        ({}, ((7,), (8,), ()), "group ID 8"),
        ({"setgroups": False}, ((7,), (7,), (100001,)), "setgroups is denied"),
        ({"setgroups": False}, ((7,), (7,), (1000, 4)), ""),
    ],
)
def test_who_can_be_made_inside(changes: dict[str, Any], ids: tuple[Any, Any, Any], lacking: str) -> None:
    found = users(**changes).lacks(*ids)
    assert lacking in found
    assert bool(found) == bool(lacking)


NONE = Capabilities(inheritable=0, permitted=0, effective=0, bounding=0, ambient=0)


def credentials(user: int, groups: tuple[int, ...]) -> Credentials:
    ids = Ids(user, user, user, user)
    return Credentials(users=ids, group_ids=ids, groups=groups, capabilities=NONE, securebits=0, no_new_privs=False)


BORN = {
    "Uid": "0 0 0 0",
    "Gid": "0 0 0 0",
    "Groups": "1000 4",
    "CapInh": "0",
    "CapPrm": "0",
    "CapEff": "0",
    "CapBnd": "0",
    "CapAmb": "0",
    "NoNewPrivs": "0",
}


def calls_of(state: Credentials, space: Users | None) -> list[str]:
    task = TaskBuilder(pid=1, tid=1, warn=print, birth=dict(BORN), users=space)
    state.rebuild(task)
    return task.calls._labels


def test_groups_that_a_task_was_born_with_are_left_alone() -> None:
    assert "set the supplementary groups" not in calls_of(credentials(100001, (4, 1000)), users())
    assert "set the supplementary groups" in calls_of(credentials(100001, (100001,)), users())
    assert "set the supplementary groups" in calls_of(credentials(100001, (4, 1000)), None)


def test_an_id_that_is_nobody_inside_is_refused() -> None:
    with pytest.raises(StateRefused, match="99 is not in the map"):
        calls_of(credentials(99, ()), users())


@pytest.mark.parametrize(
    ("seen", "inside", "root"),
    [
        ("0::/a/b\n", "0::/\n", "/a/b"),
        ("0::/a/b\n", "0::/b\n", "/a"),
        ("0::/b\n", "0::/b\n", "/"),
        ("0::/\n", "0::/\n", "/"),
        ("0::/a\n", "0::/../a\n", None),
        ("0::/a\n", "", None),
        ("0::/a\n", "0::/b\n", None),
    ],
)
def test_where_a_cgroup_namespace_begins(seen: str, inside: str, root: str | None) -> None:
    found = namespace_roots(seen, inside)
    assert found == (None if root is None else (Cgroup("", root),))
