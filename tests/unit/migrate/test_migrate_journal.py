"""The journal: read back, torn, damaged, another host's, old."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from migrate.addresses import AddressRecord, Configuration, InterfaceRecord
from migrate.arrival import ArrivalRecord, Landing
from migrate.departure import DepartureRecord
from migrate.errors import JournalDamaged, JournalUnusable
from migrate.journal import (
    KEEP,
    ROOM,
    AddressesArrive,
    AddressesLeave,
    Closed,
    End,
    Journal,
    Note,
    Role,
    Step,
    StepKind,
    journals,
    read_journal,
)

NAME = "0123456789abcdef" * 2
ADDRESS = AddressRecord(address="10.0.0.1", prefixlen=24, interface="eth0")


def made(directory: Path, name: str = NAME, role: Role = Role.SOURCE) -> Journal:
    return Journal.open(role, name, roots=(7,), host="b", rsh="ssh -p 22", directory=directory)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    journal = made(tmp_path)
    departure = DepartureRecord(
        moved=("10.0.0.1",),
        configuration=Configuration(
            interfaces=(InterfaceRecord(index=2, name="eth0", mac="", flags=1, addresses=(ADDRESS,)),), routes=(b"\0",)
        ),
    )
    arrival = ArrivalRecord(landings=(Landing(record=ADDRESS, interface=3),))
    journal.note("sockets", b"\x00\xff")
    journal.append(AddressesLeave(departure=departure), Step(step=StepKind.COMMIT))
    journal.append(AddressesArrive(arrival=arrival))
    view = read_journal(journal.path)
    assert view.opened.roots == (7,)
    assert (view.opened.host, view.opened.rsh) == ("b", "ssh -p 22")
    assert view.records[1:] == (
        Note(name="sockets", data=b"\x00\xff"),
        AddressesLeave(departure=departure),
        Step(step=StepKind.COMMIT),
        AddressesArrive(arrival=arrival),
    )
    assert view.mine
    assert view.alive
    assert not view.torn
    assert view.closed is None
    assert view.reached(StepKind.COMMIT)
    assert not view.reached(StepKind.RUNNING)
    journal.leave()
    assert not read_journal(journal.path).alive


def test_closing_gives_the_room_back(tmp_path: Path) -> None:
    journal = made(tmp_path)
    assert journal.path.stat().st_size == ROOM
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.finish(End.MOVED)
    assert journal.path.stat().st_size < 1000
    view = read_journal(journal.path)
    assert isinstance(view.closed, Closed)
    assert view.closed.end is End.MOVED
    assert not view.torn


def test_a_record_longer_than_the_room(tmp_path: Path) -> None:
    journal = made(tmp_path)
    journal.note("big", bytes(3 * ROOM))
    journal.step(StepKind.ABORTED)
    view = read_journal(journal.path)
    assert view.reached(StepKind.ABORTED)


@pytest.mark.parametrize("room", [True, False])
def test_a_record_torn_at_any_byte_is_ignored(tmp_path: Path, room: bool) -> None:
    journal = made(tmp_path)
    whole = journal._end
    journal.step(StepKind.COMMIT, "detail")
    data = journal.path.read_bytes()
    journal.leave()
    for cut in range(whole, journal._end):
        journal.path.write_bytes(data[:cut] + (bytes(len(data) - cut) if room else b""))
        view = read_journal(journal.path)
        assert not view.reached(StepKind.COMMIT), cut
        assert view.torn == (cut > whole and any(data[whole:cut])), cut


def test_damage_in_the_middle_is_said(tmp_path: Path) -> None:
    journal = made(tmp_path)
    before = journal._end
    journal.step(StepKind.COMMIT)
    journal.step(StepKind.RUNNING)
    data = bytearray(journal.path.read_bytes())
    data[before + 12] ^= 1
    journal.path.write_bytes(data)
    with pytest.raises(JournalDamaged):
        read_journal(journal.path)
    assert list(journals(tmp_path)) == []


@pytest.mark.parametrize("data", [b"", b"TCPMIGJ1", b"something else", b"TCPMIGJ1" + bytes(100)])
def test_what_is_no_journal_is_said(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(JournalDamaged):
        read_journal(path)


def test_journals_of_this_and_of_other_hosts(tmp_path: Path) -> None:
    one = made(tmp_path)
    two = Journal(
        dataclasses.replace(read_journal(one.path).opened, migration="ff" * 16, boot_id="another", wall=1.0),
        directory=tmp_path,
    )
    (tmp_path / "journals" / "README").write_text("not a journal")
    found = list(journals(tmp_path))
    assert [v.opened.migration for v in found] == ["ff" * 16, NAME], "oldest first"
    assert [v.mine for v in found] == [False, True]
    two.leave()
    one.leave()
    assert list(journals(tmp_path / "none")) == []


def test_only_closed_journals_are_pruned(tmp_path: Path) -> None:
    closed, left = made(tmp_path, "aa" * 16), made(tmp_path, "bb" * 16)
    closed.finish(End.ABORTED)
    left.leave()
    for path in (closed.path, left.path):
        os.utime(path, (1, 1))
    made(tmp_path, "cc" * 16).leave()
    assert [v.opened.migration for v in journals(tmp_path)] == ["bb" * 16, "cc" * 16]
    assert KEEP > 86400


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journals").write_text("a file where a directory should be")
    with pytest.raises(JournalUnusable):
        made(tmp_path)
    with pytest.raises(JournalUnusable):
        made(tmp_path, "../../etc/passwd")


def test_a_migration_has_one_journal_per_side(tmp_path: Path) -> None:
    made(tmp_path).leave()
    with pytest.raises(JournalUnusable):
        made(tmp_path)
    made(tmp_path, role=Role.TARGET).leave()
