"""Write docs/reference/keywords.md out of the registry: ``python scripts/keywords_reference.py [FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tcpstate.keywords import TABLE, Change, Keyword, Kind
from tcpstate.options import EXCLUDED

SECTIONS = {
    "Hard state": "Without it the connection could not go on unnoticed by its peer and its owner.",
    "Soft state": "It may be lost: it is learned again, or only counts and tunes.",
    "Socket options": "Hard unless the column says `soft`: the owner relies on them.",
}
HEAD = """# State keywords

<!-- Written by `make docs` from tcpstate/keywords.py. Change the table there, not this page. -->

What `transport_state_get` and `tcpmig get` read, and `transport_state_set` and `tcpmig set` write
([tcpstate.md](tcpstate.md)). The wild cards `ALL`, `ALL_HARD` and `ALL_SOFT` (`all`, `hard`, `soft` on the command
line) mean every keyword below of that kind, but for `receive_queue` and the marks in it (`urgent_in`,
`urgent_taken`): these are only read by their names, and the marks are set once the data is there.

*life*: `fixed` for the whole connection, `initialization` (settled by the handshake), or `varying`.
*set*: how it is written: `setsockopt` in place, `repair mode` with the owner stopped for that moment, `BPF`;
`*`: takes CAP_NET_ADMIN. *source*: where it is read, the first that this host has; repair mode only if the connection
is frozen. What no source tells is *uninitialized*.
"""
ROW = "| {} | {} | {} | {} | {} | {} | {} |"


def section_of(keyword: Keyword) -> str:
    """In which table it stands."""
    if "." in keyword.name:
        return "Socket options"
    return "Hard state" if keyword.hard else "Soft state"


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for section, about in SECTIONS.items():
        lines += ["", f"## {section}", "", about, ""]
        lines += [ROW.format("keyword", "datatype", "unit", "life", "set", "source", "meaning"), "|---" * 7 + "|"]
        lines += [row(keyword) for keyword in TABLE if section_of(keyword) == section]
    lines += ["", "## Socket options that are no keywords", ""]
    lines += ["| level | number | why |", "|---|---|---|"]
    lines += [f"| {level.name} | {int(number)} | {why} |" for (level, number), why in EXCLUDED.items()]
    return "\n".join(lines) + "\n"


def row(keyword: Keyword) -> str:
    """One line of a table."""
    changed = "-" if keyword.change is Change.NONE else keyword.change.value + ("*" if keyword.privileged else "")
    sources = ", ".join(
        f"{s.kind.value} `{s.name}`" if s.kind not in (Kind.OPTION, Kind.NAME, Kind.IOCTL) else f"`{s.name}`"
        for s in keyword.sources
    )
    meaning = keyword.meaning + ("" if keyword.hard or "." not in keyword.name else "; soft")
    return ROW.format(
        f"`{keyword.name}`", keyword.datatype.value, keyword.unit, keyword.life.value, changed, sources, meaning
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
