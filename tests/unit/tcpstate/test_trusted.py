"""Instances made without their checks are like any other."""

import abc
import dataclasses
import pickle

import pytest

from tcpstate.connid import ConnId
from tcpstate.record import Timestamps, Windows
from tcpstate.trusted import maker


def test_they_are_equal_to_those_that_are_made_as_usual():
    make = maker(Windows, "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")
    made, usual = make(1, 2, 3, 4, 5), Windows(snd_wl1=1, snd_wnd=2, max_window=3, rcv_wnd=4, rcv_wup=5)
    assert type(made) is Windows
    assert made == usual
    assert hash(made) == hash(usual)
    assert repr(made) == repr(usual)
    assert dataclasses.replace(made, snd_wnd=9) == dataclasses.replace(usual, snd_wnd=9)
    assert pickle.loads(pickle.dumps(made)) == usual


def test_they_are_frozen():
    made = maker(Timestamps, "value", "microseconds")(1, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.value = 2


def test_fields_in_another_order_or_of_another_class_are_refused():
    with pytest.raises(TypeError, match="fields value microseconds"):
        maker(Timestamps, "microseconds", "value")
    with pytest.raises(TypeError, match="protocol"):
        maker(ConnId, "protocol", "local")


@dataclasses.dataclass(frozen=True, slots=True)
class Base(abc.ABC):
    first: int

    @abc.abstractmethod
    def what(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Derived(Base):
    second: int

    def what(self) -> str:
        return f"{self.first} {self.second}"


@dataclasses.dataclass(frozen=True, slots=True)
class Without(Base):
    def what(self) -> str:
        return f"{self.first}"


def test_classes_that_inherit_fields_and_make_good_what_is_abstract():
    made = maker(Derived, "first", "second")(1, 2)
    assert made == Derived(1, 2)
    assert made.what() == "1 2"
    assert maker(Without, "first")(3).what() == "3"


def test_a_class_without_slots_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        value: int

    with pytest.raises(TypeError, match="slots"):
        maker(Plain, "value")
