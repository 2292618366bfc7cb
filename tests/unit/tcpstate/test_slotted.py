"""Our dataclasses are those of the standard library, but for when their code is compiled."""

import abc
import ast
import contextlib
import copy
import dataclasses
import pickle
from dataclasses import field
from pathlib import Path
from typing import ClassVar

import pytest

import tcpstate
from tcpstate import slotted
from tcpstate.slotted import complete, dataclass

ROOMS = Path(tcpstate.__file__).parents[1]


def both(body):
    """The same class by either decorator: ``body(decorator) -> class``."""
    return body(dataclass), body(dataclasses.dataclass)


def point(decorator):
    @decorator(frozen=True, slots=True)
    class Point:
        """A place."""

        x: int
        y: int = 0
        hidden: str = field(default="h", repr=False, compare=False)
        made: list[int] = field(default_factory=list, hash=False)
        KNOWN: ClassVar[int] = 3

        def __post_init__(self):
            if self.x < 0:
                raise ValueError("negative")

    return Point


def named(decorator):
    @decorator(frozen=True, slots=True, kw_only=True)
    class Named:
        one: int = 1
        two: str
        later: int = field(init=False, default=7)

    return Named


def mutable(decorator):
    @decorator(slots=True)
    class Mutable:
        one: int
        many: dict[str, int] = field(default_factory=dict)
        inner: list[int] = field(init=False, default_factory=list)

    return Mutable


def ordered(decorator):
    @decorator(frozen=True, slots=True, order=True)
    class Ordered:
        first: int
        second: str

    return Ordered


def same(decorator):
    @decorator(slots=True, eq=False)
    class Same:
        one: int

    return Same


def empty(decorator):
    @decorator(frozen=True, slots=True)
    class Empty:
        pass

    return Empty


def of_its_own(decorator):
    @decorator(frozen=True, slots=True)
    class Own:
        one: int

        def __eq__(self, other):
            return isinstance(other, type(self)) and self.one % 10 == other.one % 10

        def __hash__(self):
            return self.one % 10

        def __repr__(self):
            return "mine"

    return Own


def equal_alone(decorator):
    @decorator(frozen=True, slots=True)
    class Alone:
        one: int

        def __eq__(self, other):
            return True

    return Alone


@pytest.mark.parametrize(
    ("body", "samples"),
    [
        (point, [((1,), {}), ((1, 2), {}), ((1,), {"hidden": "other"}), ((1,), {"made": [5]}), ((), {"x": 4})]),
        (named, [((), {"two": "a"}), ((), {"one": 2, "two": "a"})]),
        (mutable, [((1,), {}), ((1, {"a": 1}), {})]),
        (ordered, [((1, "b"), {}), ((1, "c"), {}), ((2, "a"), {})]),
        (same, [((1,), {}), ((1,), {})]),
        (empty, [((), {}), ((), {})]),
        (of_its_own, [((1,), {}), ((11,), {}), ((2,), {})]),
        (equal_alone, [((1,), {}), ((2,), {})]),
    ],
)
def test_a_class_is_what_the_standard_library_makes_of_it(body, samples):
    ours, theirs = both(body)
    mine = [ours(*args, **named) for args, named in samples]
    usual = [theirs(*args, **named) for args, named in samples]
    assert list(map(repr, mine)) == list(map(repr, usual))
    assert [a == b for a in mine for b in mine] == [a == b for a in usual for b in usual]
    assert [dataclasses.asdict(one) for one in mine] == [dataclasses.asdict(one) for one in usual]
    assert ours.__match_args__ == theirs.__match_args__
    assert ours.__slots__ == theirs.__slots__
    assert (ours.__hash__ is None) == (theirs.__hash__ is None)
    assert (ours.__hash__ is object.__hash__) == (theirs.__hash__ is object.__hash__)
    for wrong in (((1, 2, 3, 4, 5, 6), {}), ((), {"none": 1})):
        for cls in (ours, theirs):
            with pytest.raises(TypeError):
                cls(*wrong[0], **wrong[1])


def test_equal_ones_have_equal_hashes_and_others_compare_by_their_order():
    cls = ordered(dataclass)
    assert hash(cls(1, "b")) == hash(cls(1, "b"))
    assert len({cls(1, "b"), cls(1, "b"), cls(1, "c")}) == 2
    some = [cls(2, "a"), cls(1, "c"), cls(1, "b")]
    assert [(one.first, one.second) for one in sorted(some)] == [(1, "b"), (1, "c"), (2, "a")]
    assert cls(1, "b") <= cls(1, "b")
    with pytest.raises(TypeError):
        cls(1, "b") < (1, "b")  # noqa: B015
    # what is left out of the comparison, or of the hash, does not count
    place = point(dataclass)
    assert place(1, hidden="a") == place(1, hidden="b")
    assert hash(place(1, made=[1])) == hash(place(1, made=[2]))
    assert place(1) != ordered(dataclass)(1, "a")


def test_a_frozen_one_is_frozen_and_its_rules_hold():
    cls = point(dataclass)
    one = cls(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.more = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.x
    with pytest.raises(ValueError, match="negative"):
        cls(-1)
    with pytest.raises(ValueError, match="negative"):
        dataclasses.replace(one, x=-1)
    assert dataclasses.replace(one, y=5) == cls(1, 5)
    assert cls(1).made is not cls(1).made
    assert cls.KNOWN == 3

    class Beside(cls):
        """No dataclass: it may have attributes of its own."""

    beside = Beside(1)
    beside.more = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        beside.x = 2


def test_one_that_is_not_frozen_is_set_as_usual():
    one = mutable(dataclass)(1)
    one.one = 2
    assert one.one == 2
    with pytest.raises(AttributeError):
        one.more = 1
    with pytest.raises(TypeError):
        hash(one)


@dataclass(frozen=True, slots=True)
class Base(abc.ABC):
    first: int
    others: tuple["Base", ...] = ()

    @abc.abstractmethod
    def what(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Derived(Base):
    second: int = 2

    def what(self) -> str:
        return f"{self.first} {self.second}"


def test_fields_are_inherited_and_what_is_abstract_stays_so():
    one = Derived(1, (Derived(5),), 3)
    assert one.what() == "1 3"
    assert repr(one) == "Derived(first=1, others=(Derived(first=5, others=(), second=2),), second=3)"
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    with pytest.raises(TypeError, match="abstract"):
        Base(1)
    match one:
        case Derived(first, _, second):
            assert (first, second) == (1, 3)


def test_one_that_contains_itself_can_be_shown():
    one = mutable(dataclass)(1)
    one.many["self"] = one
    assert "..." in repr(one)


def test_code_is_compiled_for_those_that_are_used_often_or_beforehand():
    often, seldom = named(dataclass), named(dataclass)
    by_fields = [cls.__init__ for cls in (often, seldom)]
    for _ in range(slotted._FEW + 1):
        often(two="a")
    one = seldom(two="a")
    assert often.__init__ is not by_fields[0]
    assert seldom.__init__ is by_fields[1]
    complete()
    assert not slotted._waiting
    assert seldom.__init__ is not by_fields[1]
    assert seldom(two="a") == one


@pytest.mark.parametrize("body", [point, named, mutable])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ((), {}),
        ((1,), {}),
        ((1, 2, "h", [3]), {}),
        ((1, 2, "h", [3], 5), {}),
        ((1,), {"x": 2}),
        ((1,), {"one": 2}),
        ((-1,), {}),
        ((), {"two": "b"}),
        ((), {"two": "b", "one": 3}),
        ((), {"two": "b", "later": 3}),
        ((), {"two": "b", "other": 3}),
        ((), {"x": 1, "made": []}),
        ((1, {"a": 2}), {}),
        ((), {"one": 1, "inner": []}),
    ],
)
def test_arguments_are_taken_and_refused_as_ever(body, compiled, arguments):
    ours, theirs = both(body)
    if compiled:
        with contextlib.suppress(TypeError):
            ours()
        complete()

    def made(cls):
        try:
            return dataclasses.asdict(cls(*arguments[0], **arguments[1]))
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    assert made(ours) == made(theirs)


def test_without_slots_it_is_refused():
    with pytest.raises(TypeError, match="slots"):
        dataclass(frozen=True)


def test_the_rooms_use_no_other():
    for room in ("tcpstate", "checkpoint", "migrate", "cli"):
        for path in (ROOMS / room).rglob("*.py"):
            if path.name == "slotted.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "dataclasses":
                    assert "dataclass" not in [name.name for name in node.names], path
                if isinstance(node, ast.Attribute) and node.attr == "dataclass":
                    assert not (isinstance(node.value, ast.Name) and node.value.id == "dataclasses"), path
