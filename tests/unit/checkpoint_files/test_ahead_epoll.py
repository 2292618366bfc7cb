"""Epoll instances told ahead: what was told, less what is dropped, and what the stop tells, is what is there."""

import random
from types import SimpleNamespace

import pytest

from checkpoint.files import aheadepoll
from checkpoint.files.aheadepoll import AheadEpolls, Watchable
from checkpoint.kernel import epolltree, filetable
from checkpoint.kernel.epolltree import Watched
from checkpoint.kernel.filetable import Row

PID, EPOLL = 7, 3
PLACE = PID, EPOLL


def packed(entries):
    return b"".join(epolltree.pack(one) for one in sorted(entries))


class FakeReader:
    def __init__(self, most):
        self.now = b""

    def read(self, pid, fd):
        return self.now if (pid, fd) == PLACE else None

    def close(self):
        pass


@pytest.fixture
def epolls(monkeypatch):
    monkeypatch.setattr(aheadepoll, "Reader", FakeReader)
    monkeypatch.setattr(aheadepoll, "_is_epoll", lambda pid, fd: fd == EPOLL)
    rows = [row(EPOLL, 0x300), row(2, 0x200)]
    monkeypatch.setattr(filetable, "read", lambda pid: rows)
    monkeypatch.setattr(filetable, "rows", lambda data: iter(data))
    return AheadEpolls()


def row(fd, file, cookie=0):
    return Row(fd=fd, flags=2, owner=0, file=file, cookie=cookie, locks=0)


def told(epolls, files, entries):
    reader = FakeReader(0)
    reader.now = packed(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aheadepoll, "Reader", lambda most: reader)
        return reader, epolls.read({PID: files})


def view(tables, closed=(), entries=()):
    table = SimpleNamespace(tables=tables, closed=set(closed), entries=list(entries))
    return SimpleNamespace(places=[PLACE], table=table)


def entry(file, number, events=1, data=0):
    return Watched(file, number, events, data)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_lost_and_nothing_is_taken_for_what_it_is_not(epolls, seed):
    chance = random.Random(seed)
    count = chance.randrange(1, 40)
    # connections at descriptors from 10 on; their descriptions lie anywhere
    where = chance.sample(range(1000, 9000), count)
    files = {where[i]: Watchable(i, 10 + i) for i in range(count)}
    first = [entry(where[i], 10 + i, chance.choice([1, 5]), i) for i in range(count) if chance.random() < 0.8]
    first.append(entry(0x200, 2))
    reader, ahead = told(epolls, files, first)
    numbers = {} if not ahead else {watch.number: watch for watch in ahead[0].watches}
    # until the stop: events change, entries come and go, descriptors are closed and opened anew
    gone = [i for i in range(count) if chance.random() < 0.2]
    now = dict(files)
    fresh, tables = [row(EPOLL, 0x300), row(2, 0x200)], {}
    for i in range(count):
        tables[10 + i] = (i, True)
    moved = {}
    for i in gone:
        what = chance.randrange(3)
        file = where[i] if what == 0 else chance.randrange(20_000, 30_000)
        moved[where[i]] = None if what else where[i]
        if what < 2:
            fresh.append(row(10 + i, file))
            tables[10 + i] = (1000 + i, False)
            now[file] = Watchable(1000 + i, 10 + i)
        else:
            del tables[10 + i]
    tables[2] = (2000, False)
    second = []
    for one in first:
        if moved.get(one.file, one.file) is None or chance.random() < 0.1:
            continue
        second.append(one._replace(events=chance.choice([one.events, 4])))
    watched = {(one.file, one.number) for one in second}
    for fd in chance.sample(sorted(tables), min(3, len(tables))):
        file = next((r.file for r in fresh if r.fd == fd), None) or where[fd - 10]
        if (file, fd) not in watched:
            second.append(entry(file, fd, 3, 99))
    reader.now = packed(second)
    epolls.stand(PID, fresh)
    entries = [SimpleNamespace(pid=PID, fd=10 + i) for i in range(count)]
    kept = epolls.capture(view({PID: tables}, entries=entries), gone)
    if not ahead:
        assert kept is None
        return
    assert kept is not None
    assert kept.told == 0
    left = {(w.number, w.file, w.events, w.data) for n, w in numbers.items() if n not in kept.dropped}
    result = sorted([*left, *((w.number, w.file, w.events, w.data) for w in kept.watches)])
    assert result == sorted((one.number, tables[one.number][0], one.events, one.data) for one in second)
    # of what stands there, nothing watches a connection that is not as it was
    assert not {file for _, file, _, _ in left} & set(gone)


def test_an_entry_whose_number_leads_elsewhere_is_told_with_all_others(epolls):
    files = {1000: Watchable(0, 10), 2000: Watchable(1, 11)}
    reader, ahead = told(epolls, files, [entry(1000, 10), entry(2000, 11)])
    assert [watch.number for watch in ahead[0].watches] == [10, 11]
    epolls.stand(PID, [row(EPOLL, 0x300), row(12, 3000), row(10, 4000)])
    tables = {PID: {10: (5, True), 11: (1, True), 12: (6, True)}}
    entries = [SimpleNamespace(pid=PID, fd=10), SimpleNamespace(pid=PID, fd=11)]
    # the first was duplicated to 12, and its number given to another file
    reader.now = packed([entry(1000, 10), entry(2000, 11)])
    assert epolls.capture(view(tables, entries=entries), [0]) is None


def test_two_entries_by_one_number_are_told_with_all_others(epolls):
    reader, _ = told(epolls, {1000: Watchable(0, 10)}, [entry(1000, 10)])
    epolls.stand(PID, [row(EPOLL, 0x300), row(12, 3000)])
    reader.now = packed([entry(1000, 10), entry(3000, 10)])
    assert (
        epolls.capture(view({PID: {10: (0, True), 12: (6, True)}}, entries=[SimpleNamespace(pid=PID, fd=10)]), [])
        is None
    )


def test_what_fdinfo_would_tell_of_locks_is_asked_of_it(epolls):
    told(epolls, {1000: Watchable(0, 10)}, [entry(1000, 10)])
    epolls.stand(PID, [row(EPOLL, 0x300)])
    assert epolls.row(PID, EPOLL) == row(EPOLL, 0x300)
    epolls.stand(PID, [row(EPOLL, 0x300)._replace(locks=1)])
    assert epolls.row(PID, EPOLL) is None
    assert epolls.row(PID, 2) is None


def test_what_was_given_up_is_watched_by_nobody(epolls):
    reader, _ = told(epolls, {1000: Watchable(0, 10)}, [entry(1000, 10)])
    epolls.stand(PID, [row(EPOLL, 0x300), row(12, 3000)])
    reader.now = packed([entry(1000, 10), entry(3000, 12)])
    kept = epolls.capture(view({PID: {10: (0, True)}}, closed=[(PID, 12)]), [])
    assert kept is not None
    assert (kept.watches, kept.dropped) == ((), ())
