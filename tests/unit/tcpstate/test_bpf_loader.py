"""The BPF loader's parts that need no kernel: assembler, BTF parser, remembered numbers."""

import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstate.kernel.bpf import layout as layouts
from tcpstate.kernel.bpf.asm import Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Btf, Kind, Place, minimal
from tcpstate.kernel.bpf.layout import Layout


def test_instructions_are_encoded_as_the_standard_says():
    # RFC 9669: opcode, dst | src << 4, offset, immediate
    assert Asm().set(0, 0).exit().code().hex() == "b7000000000000009500000000000000"
    assert Asm().load(4, 1, 6, 16).code().hex() == "6161100000000000"
    assert Asm().store(8, 10, -8, 7).code().hex() == "7b7af8ff00000000"
    assert Asm().call(Helper.MAP_LOOKUP).code().hex() == "8500000001000000"
    assert Asm().set(1, 0xFFFFFFFF).code().hex() == "b7010000ffffffff"
    assert Asm().map(1, 5).code().hex() == "1811000005000000" + "0" * 16


def test_jumps_find_their_labels_both_ways():
    code = Asm().label("top").jump_if(Jump.EQUAL, 1, 7, "end").jump("top").label("end").exit(0).code()
    assert struct.unpack_from("=h", code, 2) == (1,)
    assert struct.unpack_from("=h", code, 10) == (-2,)


def test_a_label_that_is_missing_or_twice_there_is_an_error():
    with pytest.raises(ValueError, match="no label"):
        Asm().jump("nowhere").code()
    with pytest.raises(ValueError, match="twice"):
        Asm().label("a").label("a")


def build_btf(types, names):
    body = b"".join(types)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(names)) + body + names


def head(name, kind, count, size, flag=0):
    return struct.pack("=III", name, flag << 31 | kind << 24 | count, size)


NAMES = b"\0int\0outer\0inner\0a\0b\0c\0d\0run\0"
OUTER, INNER, A, B, C, D, RUN = (NAMES.index(n + b"\0") for n in (b"outer", b"inner", b"a", b"b", b"c", b"d", b"run"))
SMALL = build_btf(
    [
        head(1, Kind.INT, 0, 4) + struct.pack("=I", 32),  # 1: int
        head(0, Kind.ARRAY, 0, 0) + struct.pack("=III", 1, 1, 3),  # 2: int[3]
        # 3: struct { int c : 5; int d : 3 } without a name
        head(0, Kind.STRUCT, 2, 4, 1) + struct.pack("=III", C, 1, 5 << 24) + struct.pack("=III", D, 1, 3 << 24 | 5),
        head(INNER, Kind.STRUCT, 2, 16) + struct.pack("=III", A, 2, 0) + struct.pack("=III", 0, 3, 96),  # 4
        head(0, Kind.CONST, 0, 4),  # 5: const struct inner
        head(OUTER, Kind.STRUCT, 2, 24) + struct.pack("=III", A, 6, 0) + struct.pack("=III", B, 5, 64),  # 6
        head(RUN, Kind.FUNCTION, 0, 0),  # 7
    ],
    NAMES,
)


def test_members_are_found_through_qualifiers_embedded_and_anonymous_structures():
    btf = Btf(SMALL)
    assert btf.place("outer", "b.a") == Place(8, 12, 64, 0)
    assert btf.place("outer", "b.d") == Place(20, 4, 165, 3)
    assert (btf.size("outer"), btf.index("outer", "b"), btf.id(Kind.FUNCTION, "run")) == (24, 1, 7)
    with pytest.raises(BadBtf, match=r"no b\.nothing"):
        btf.place("outer", "b.nothing")
    with pytest.raises(BadBtf, match="no struct gone"):
        btf.size("gone")


def test_a_structure_that_contains_itself_ends():
    btf = Btf(
        build_btf([head(OUTER, Kind.STRUCT, 1, 4) + struct.pack("=III", 0, 1, 0), head(0, Kind.CONST, 0, 2)], NAMES)
    )
    with pytest.raises(BadBtf):
        btf.place("outer", "a")


@given(st.integers(0, len(SMALL)), st.binary(max_size=8))
@settings(max_examples=200, deadline=None)
def test_damaged_btf_is_one_kind_of_error(at, junk):
    data = SMALL[:at] + junk + SMALL[at + len(junk) :]
    try:
        btf = Btf(data)
        btf.place("outer", "b.d")
        btf.size("inner")
    except BadBtf:
        return


def test_the_smallest_btf_is_btf():
    assert Btf(minimal())


@pytest.fixture
def parses(monkeypatch):
    """How often the kernel's BTF was parsed."""
    count = []

    def of_kernel():
        count.append(1)
        return Btf(SMALL)

    monkeypatch.setattr(layouts.Btf, "of_kernel", of_kernel)
    return count


def test_all_that_is_asked_is_answered_from_one_parse(tmp_path, parses):
    known = Layout("k1", tmp_path)
    known.offset("outer", "b")
    known.save()
    known.size("outer")
    known.save()
    assert known.id(Kind.STRUCT, "outer") == known.id(Kind.STRUCT, "outer") == 6
    assert len(parses) == 1


def test_numbers_are_remembered_and_absence_too(tmp_path, parses):
    first = Layout("k1", tmp_path / "cache")
    assert first.offset("outer", "b") == 8
    with pytest.raises(BadBtf):
        first.offset("outer", "nothing")
    first.save()
    assert len(parses) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    again = Layout("k1", tmp_path / "cache")
    assert again.offset("outer", "b") == 8
    with pytest.raises(BadBtf):
        again.offset("outer", "nothing")
    assert len(parses) == 1
    # another kernel
    assert Layout("k2", tmp_path / "cache").offset("outer", "b") == 8
    assert len(parses) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        json.dumps({"build": "k1"}).encode(),
        json.dumps({"build": "k1", "numbers": []}).encode(),
        json.dumps({"build": "k1", "numbers": {"place outer b": [-8, 1, 1, 1]}}).encode(),
        json.dumps({"build": "k1", "numbers": {"place outer b": ["8"]}}).encode(),
        json.dumps({"build": "k1", "numbers": {"place outer b": [8]}}).encode(),
        json.dumps({"build": "k1", "numbers": {"place outer b": [True, 1, 1, 1]}}).encode(),
        json.dumps({"build": "other", "numbers": {"place outer b": [4, 1, 1, 1]}}).encode(),
    ],
)
def test_a_damaged_file_is_as_if_it_were_not_there(tmp_path, parses, content):
    file = tmp_path / "btf-k1.json"
    file.write_bytes(content)
    file.chmod(0o600)
    known = Layout("k1", tmp_path)
    assert (known.offset("outer", "b"), len(parses)) == (8, 1)
    known.save()
    assert (Layout("k1", tmp_path).offset("outer", "b"), len(parses)) == (8, 1)


LIE = json.dumps({"build": "k1", "numbers": {"place outer b": [4, 1, 1, 1]}})


def test_a_file_that_others_could_have_written_is_not_read(tmp_path, parses):
    file = tmp_path / "btf-k1.json"
    file.write_text(LIE)
    file.chmod(0o620)
    assert Layout("k1", tmp_path).offset("outer", "b") == 8
    file.chmod(0o600)
    assert Layout("k1", tmp_path).offset("outer", "b") == 4  # it would have been believed
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    assert Layout("k1", tmp_path).offset("outer", "b") == 8
    file.unlink()
    os.mkfifo(file, 0o600)
    assert Layout("k1", tmp_path).offset("outer", "b") == 8
    assert len(parses) == 3


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path, parses):
    (tmp_path / "cache").write_text("a file")
    known = Layout("k1", tmp_path / "cache")
    assert known.offset("outer", "b") == 8
    known.save()
    assert len(parses) == 1
