"""Regular files, directories, pipes, devices: what has a path or nothing but bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.system.state.case import Here, case


@case("files/file", "aspect/position")
def positions_and_sharing(here: Here) -> Iterator[None]:
    path = here.path("file")
    first = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(first, b"0123456789")
    os.lseek(first, 4, 0)
    second = os.dup(first)
    appending = os.open(path, os.O_WRONLY | os.O_APPEND)
    yield
    assert os.read(first, 2) == b"45"
    assert os.read(second, 1) == b"6"
    os.write(appending, b"end")
    assert os.pread(first, 99, 0) == b"0123456789end"


@case("files/directory")
def position_in_a_directory(here: Here) -> Iterator[None]:
    for name in "abcdef":
        os.close(os.open(here.path(name), os.O_CREAT | os.O_WRONLY))
    fd = os.open(here.folder, os.O_RDONLY | os.O_DIRECTORY)
    yield
    assert sorted(os.listdir(fd)) == list("abcdef")


@case("files/path-only")
def a_link_itself(here: Here) -> Iterator[None]:
    os.symlink("nowhere", here.path("link"))
    fd = os.open(here.path("link"), os.O_PATH | os.O_NOFOLLOW)
    yield
    assert os.readlink("", dir_fd=fd) == "nowhere"


@case("files/pipe")
def bytes_in_a_pipe(here: Here) -> Iterator[None]:
    r, w = os.pipe()
    os.write(w, b"x" * 5000)
    yield
    assert os.read(r, 9999) == b"x" * 5000
    os.write(w, b"y")
    assert os.read(r, 9) == b"y"
