"""The codec: what is written comes back equal, and whatever does not fit is BadRecord and nothing else."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstate import codec
from tcpstate.errors import BadRecord


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


@codec.family
@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str


@codec.member(Shape, "circle")
@dataclass(frozen=True, slots=True, kw_only=True)
class Circle(Shape):
    radius: int

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError("a radius is not negative")


@codec.member(Shape, "square")
@dataclass(frozen=True, slots=True, kw_only=True)
class Square(Shape):
    side: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    flag: bool
    number: int
    text: str
    raw: bytes
    colour: Colour
    maybe: int | None
    many: tuple[int, ...]
    pair: tuple[str, int]
    table: dict[int, bytes]
    shapes: list[Shape]
    chosen: frozenset[int]
    later: int = 7
    inner: Circle | None = field(default=None)


@pytest.fixture(autouse=True, scope="module", params=["by its fields", "by a function written for it"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a class is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_SELDOM", 0 if "written" in request.param else 1 << 60)
        codec._decoder.cache_clear()
        codec._dataclass_decoder.cache_clear()
        yield
    codec._decoder.cache_clear()
    codec._dataclass_decoder.cache_clear()


u64 = st.integers(-(2**63), 2**64 - 1)
shapes = st.one_of(
    st.builds(Circle, name=st.text(), radius=st.integers(0, 2**63)),
    st.builds(Square, name=st.text(), side=st.floats(0, 9)),
)
everything = st.builds(
    Everything,
    flag=st.booleans(),
    number=u64,
    text=st.text(),
    raw=st.binary(),
    colour=st.sampled_from(Colour),
    maybe=st.none() | u64,
    many=st.lists(u64).map(tuple),
    pair=st.tuples(st.text(), u64),
    table=st.dictionaries(u64, st.binary(), max_size=4),
    shapes=st.lists(shapes, max_size=3),
    chosen=st.frozensets(u64, max_size=4),
    later=u64,
    inner=st.none() | st.builds(Circle, name=st.text(), radius=st.integers(0, 5)),
)


@given(everything)
def test_what_is_packed_unpacks_equal(value: Everything) -> None:
    assert codec.unpack(Everything, codec.pack(value)) == value


@given(st.binary(max_size=200))
def test_random_bytes_are_bad_records(data: bytes) -> None:
    with pytest.raises(BadRecord):
        codec.unpack(Everything, data)


@given(everything, st.data())
def test_altered_bytes_give_a_value_or_bad_record(value: Everything, data: st.DataObject) -> None:
    packed = bytearray(codec.pack(value))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    try:
        codec.unpack(Everything, bytes(packed))
    except BadRecord:
        return


@given(everything, st.integers(0, 10_000))
def test_truncated_bytes_are_bad_records(value: Everything, cut: int) -> None:
    packed = codec.pack(value)
    with pytest.raises(BadRecord):
        codec.unpack(Everything, packed[: cut % len(packed)])


SMALL = {
    "flag": True, "number": 1, "text": "", "raw": b"", "colour": 1, "maybe": None, "many": [], "pair": ["", 0],
    "table": {}, "shapes": [], "chosen": [],
}  # fmt: skip


def decode(**changes: object) -> Everything:
    return codec.unpack(Everything, msgpack.packb(SMALL | changes))


def test_fields_that_the_reader_does_not_know_are_skipped() -> None:
    assert decode(new="thing") == decode()


def test_fields_that_the_writer_did_not_know_take_their_defaults() -> None:
    assert decode().later == 7


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"number": True}, "number"),
        ({"flag": 1}, "flag"),
        ({"text": b"x"}, "text"),
        ({"colour": 3}, "colour"),
        ({"colour": True}, "colour"),
        ({"many": [1, "x"]}, r"many\[1\]"),
        ({"pair": ["x"]}, "pair"),
        ({"table": {"k": b""}}, "table key"),
        ({"table": {1: 2}}, r"table\[1\]"),
        ({"shapes": [{"kind": "cube", "name": ""}]}, r"shapes\[0\].*cube"),
        ({"shapes": [{"kind": "circle", "name": "", "radius": -1}]}, r"shapes\[0\].*negative"),
        ({"inner": 5}, "inner"),
        ({"chosen": [[1]]}, "chosen"),
    ],
)
def test_a_misfit_is_named_by_its_path(changes: dict[str, object], names: str) -> None:
    with pytest.raises(BadRecord, match=names):
        decode(**changes)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRecord, match="number is missing"):
        codec.unpack(Everything, msgpack.packb({k: v for k, v in SMALL.items() if k != "number"}))


def test_two_members_of_one_kind_are_a_programming_error() -> None:
    with pytest.raises(RuntimeError, match="circle"):
        codec.member(Shape, "circle")(Square)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Refers to itself, and to a family that nothing else here refers to."""

    shape: Shape | None = None
    nodes: tuple[Node, ...] = ()


def test_a_prepared_class_needs_no_annotation_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    codec.prepare(Everything, dict[int, Node])
    monkeypatch.setattr("typing.get_type_hints", None)
    value = Node(shape=Square(name="s", side=2.0), nodes=(Node(shape=Circle(name="c", radius=1)),))
    assert codec.unpack(Node, codec.pack(value)) == value


def test_a_misfit_far_inside_is_named_by_the_whole_path() -> None:
    plain = {"nodes": [{}, {"nodes": [{"shape": {"kind": "circle", "name": "", "radius": "x"}}]}]}
    with pytest.raises(BadRecord, match=r"nodes\[1\]\.nodes\[0\]\.shape\.radius: expected int, found str"):
        codec.from_plain(Node, plain)


@pytest.mark.parametrize("value", [{"a": object()}, {"a": {1, 2}, "b": [print]}])
def test_what_is_no_record_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="not a recordable type"):
        codec.pack(value)


def test_plain_is_what_is_packed() -> None:
    value = {"set": frozenset({3, 1}), "colour": Colour.RED, "view": memoryview(b"x"), "node": Node(nodes=(Node(),))}
    assert msgpack.unpackb(codec.pack(value)) == codec.to_plain(value)
    assert codec.to_plain(value)["set"] == [1, 3]
