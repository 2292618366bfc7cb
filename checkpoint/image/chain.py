"""Images that build on earlier ones: what they do not hold themselves is in the page frames of those.

An incremental image names all images that it takes pages from, by file name and root digest (record PARENTS), and of
each process the pages that each of them has (INHERITED).  Every image holds its own pages only, so a page is looked up
in one step, however long the chain.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator, Sequence

from checkpoint.errors import BadImageRecord, ParentDiffers, ParentMissing
from checkpoint.image import frames
from checkpoint.image.frames import DATA_MAX, DIGEST_SIZE, Frame, Header, Kind, PageRun, Runs, Space
from checkpoint.image.reader import ImageReader, open_image
from tcpstate.slotted import dataclass

__all__ = ["MOST", "Chain", "Inherited", "Own", "Parent", "Parents", "open_chain"]

#: images that one may build on
MOST = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An earlier image.

    path  its file, from the directory of the image that names it
    root  its root digest
    """

    path: str
    root: bytes

    def __post_init__(self) -> None:
        if len(self.root) != DIGEST_SIZE or not self.path or "\0" in self.path:
            raise ValueError("this does not name an image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parents:
    """The record PARENTS; before the first INHERITED."""

    images: tuple[Parent, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.images) <= MOST:
            raise ValueError(f"an image builds on at most {MOST} others")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """The record INHERITED.

    image  number in PARENTS
    pages  of one process's memory
    """

    image: int
    pages: Runs

    def __post_init__(self) -> None:
        if self.image < 0 or self.pages.space is not Space.MEMORY:
            raise ValueError("only pages of memory are inherited")


@dataclass(frozen=True, slots=True)
class _Span:
    """Pages [start, end) that an image holds itself."""

    start: int
    end: int
    data: memoryview


class Own:
    """The pages of processes that one image holds itself."""

    def __init__(self, image: ImageReader) -> None:
        self._spans: dict[int, list[_Span]] = {}
        for frame in image.records(Kind.PAGES):
            run = frame.pages()
            if run.space is Space.MEMORY:
                at = 0
                for start, length in run.runs:
                    span = _Span(start, start + length, run.data[at : at + length])
                    self._spans.setdefault(run.id, []).append(span)
                    at += length
        for mine in self._spans.values():
            mine.sort(key=lambda span: span.start)

    def parts(self, pid: int, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """(address, bytes) of what it holds of [start, end), by address."""
        mine = self._spans.get(pid, [])
        index = max(0, bisect.bisect_right(mine, start, key=lambda span: span.start) - 1)
        while index < len(mine) and mine[index].start < end:
            span = mine[index]
            low, high = max(start, span.start), min(end, span.end)
            if low < high:
                yield low, span.data[low - span.start : high - span.start]
            index += 1


class Chain:
    """An image and those that it builds on, all verified.

    image    the image itself
    parents  the others, in the order in which it names them
    """

    def __init__(self, image: ImageReader, parents: Sequence[ImageReader], named: Sequence[Parent]) -> None:
        self.image = image
        self.parents = list(parents)
        self.named = list(named)
        self._own: dict[int, Own] = {}
        self._inherits: dict[int, list[tuple[int, int, int]]] | None = None

    def close(self) -> None:
        """All of them."""
        self._own.clear()
        for one in (self.image, *self.parents):
            one.close()

    def own(self, number: int) -> Own:
        """What the image of this number holds; -1: the last one itself. BadImageRecord."""
        if number not in self._own:
            self._own[number] = Own(self.image if number < 0 else self.parents[number])
        return self._own[number]

    def inherited(self) -> Iterator[Inherited]:
        """The records. BadImageRecord."""
        for frame in self.image.records(Kind.INHERITED):
            found = frame.decode(Inherited)
            if found.image >= len(self.parents):
                raise BadImageRecord(
                    f"{frame.kind}: image {found.image} of {len(self.parents)}",
                    object=f"frame at offset {frame.offset}",
                )
            yield found

    def frames(self) -> Iterator[Frame]:
        """The frames of the image, with PAGES in the place of INHERITED. BadImageRecord if a page is not there."""
        for frame in self.image.frames:
            if frame.kind == Kind.INHERITED:
                found = frame.decode(Inherited)
                for run in self._bytes(found):
                    yield _page_frame(frame, run)
            elif frame.kind != Kind.PARENTS:
                yield frame

    def _bytes(self, found: Inherited) -> Iterator[PageRun]:
        if found.image >= len(self.parents):
            raise BadImageRecord(f"INHERITED: image {found.image} of {len(self.parents)}")
        own, pid = self.own(found.image), found.pages.id
        for start, length in found.pages.runs:
            at = start
            for address, data in own.parts(pid, start, start + length):
                if address != at:
                    break
                for part in range(0, len(data), DATA_MAX):
                    piece = data[part : part + DATA_MAX]
                    yield PageRun(space=Space.MEMORY, id=pid, runs=((address + part, len(piece)),), data=piece)
                at = address + len(data)
            if at != start + length:
                raise BadImageRecord(
                    f"INHERITED: page {at:x} of process {pid} is not there", object=self.parents[found.image].path
                )

    def known(self, run: PageRun) -> Iterator[tuple[int, int, int]]:
        """(start, end, image) of those pages of a run that one of the images has, byte for byte; -1: the last one."""
        at = 0
        for start, length in run.runs:
            for number, low, data in self._has(run.id, start, start + length):
                place = at + low - start
                for first, last in _alike(run.data[place : place + len(data)], data):
                    yield low + first, low + last, number
            at += length

    def _has(self, pid: int, start: int, end: int) -> Iterator[tuple[int, int, memoryview]]:
        for address, data in self.own(-1).parts(pid, start, end):
            yield -1, address, data
        for low, high, number in self._index(pid, start, end):
            for address, data in self.own(number).parts(pid, low, high):
                yield number, address, data

    def _index(self, pid: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        mine = self._ranges.get(pid, [])
        index = max(0, bisect.bisect_right(mine, start, key=lambda one: one[0]) - 1)
        while index < len(mine) and mine[index][0] < end:
            low, high = max(start, mine[index][0]), min(end, mine[index][1])
            if low < high:
                yield low, high, mine[index][2]
            index += 1

    @property
    def _ranges(self) -> dict[int, list[tuple[int, int, int]]]:
        if self._inherits is None:
            self._inherits = {}
            for one in self.inherited():
                mine = self._inherits.setdefault(one.pages.id, [])
                mine += [(start, start + length, one.image) for start, length in one.pages.runs]
            for mine in self._inherits.values():
                mine.sort()
        return self._inherits

    def heirs(self, path: str) -> list[Parent]:
        """PARENTS of an image at ``path`` that builds on this one: those of this one, then this one itself."""
        where = os.path.dirname(os.path.abspath(path))
        files = [(one.path, named.root) for one, named in zip(self.parents, self.named, strict=True)]
        files.append((self.image.path, self.image.end.root))
        return [Parent(path=_from(where, file), root=root) for file, root in files]


def _from(directory: str, file: str) -> str:
    """By its name alone if it is in the directory: images that are moved together stay together."""
    file = os.path.abspath(file)
    return os.path.basename(file) if os.path.dirname(file) == directory else file


#: below this many bytes pages are compared one by one
_FEW = 64 << 10
_PAGE = frames.ALIGNMENT


def _alike(data: memoryview, other: memoryview) -> Iterator[tuple[int, int]]:
    """[first, last) of the pages that are the same in both, neighbours put together."""
    first = last = -1
    for start, end in _same(data, other, 0, len(data)):
        if start == last:
            last = end
            continue
        if last >= 0:
            yield first, last
        first, last = start, end
    if last >= 0:
        yield first, last


def _same(data: memoryview, other: memoryview, start: int, end: int) -> Iterator[tuple[int, int]]:
    # bytes are compared by memcmp, views element by element
    if bytes(data[start:end]) == bytes(other[start:end]):
        yield start, end
    elif end - start > _PAGE:
        if end - start <= _FEW:
            for at in range(start, end, _PAGE):
                if bytes(data[at : at + _PAGE]) == bytes(other[at : at + _PAGE]):
                    yield at, at + _PAGE
            return
        middle = start + (end - start) // 2 // _PAGE * _PAGE
        yield from _same(data, other, start, middle)
        yield from _same(data, other, middle, end)


def _page_frame(of: Frame, run: PageRun) -> Frame:
    """A frame as if the image held these pages itself; its place and digest are those of the record that names them."""
    record = Runs(space=run.space, id=run.id, runs=run.runs).pack()
    header = Header(Kind.PAGES, 0, len(record), 0, len(run.data), of.digest, b"", of.offset)
    return Frame(header, record, run.data)


def open_chain(image: ImageReader, **options: object) -> Chain:
    """The chain that ends with an image that is open and verified.

    ParentMissing, ParentDiffers, ImageError: all are wholly right, or none is handed out. Closing it closes ``image``.
    """
    named: tuple[Parent, ...] = ()
    for frame in image.records(Kind.PARENTS):
        if named:
            raise BadImageRecord("PARENTS came twice", object=f"frame at offset {frame.offset}")
        named = frame.decode(Parents).images
    parents: list[ImageReader] = []
    try:
        for one in named:
            parents.append(_open_parent(image.path, one, options))
    except BaseException:
        for parent in parents:
            parent.close()
        raise
    chain = Chain(image, parents, named)
    for _ in chain.inherited():
        pass
    return chain


def _open_parent(path: str, parent: Parent, options: dict[str, object]) -> ImageReader:
    file = os.path.join(os.path.dirname(os.path.abspath(path)), parent.path)
    if not os.path.lexists(file):
        raise ParentMissing(f"{path} takes pages from this image, which is not there", object=file)
    found = open_image(file, **options)  # type: ignore[arg-type]
    if found.end.root != parent.root:
        found.close()
        raise ParentDiffers(f"{path} takes pages from another image than the one of this name", object=file)
    return found


def inherits(pieces: Iterable[tuple[int, int, int]], pid: int, at_once: int = 4096) -> Iterator[Inherited]:
    """The records for pages (start, end, image) of a process."""
    mine: dict[int, list[tuple[int, int]]] = {}
    for start, end, image in sorted(pieces):
        mine.setdefault(image, []).append((start, end - start))
    for image, runs in mine.items():
        for at in range(0, len(runs), at_once):
            yield Inherited(image=image, pages=Runs(space=Space.MEMORY, id=pid, runs=tuple(runs[at : at + at_once])))
