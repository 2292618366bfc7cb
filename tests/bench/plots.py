"""The pictures of docs/bench, out of the rows of a run. Needs matplotlib (the extra ``bench``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.results import Row

__all__ = ["PLOTS", "draw"]

Rows = Mapping[str, Sequence[Row]]


def draw(rows: Rows, folder: Path) -> list[str]:
    """Write those whose rows are there; the names of the files."""
    import matplotlib as mpl

    mpl.use("svg")
    # the same rows give the same file
    mpl.rcParams.update({"svg.hashsalt": "tcpmig", "figure.figsize": (7, 4), "axes.grid": True, "grid.alpha": 0.3})
    import matplotlib.pyplot as plt

    written = []
    for table, plot in PLOTS.items():
        if not rows.get(table):
            continue
        figure, axes = plt.subplots(layout="constrained")
        plot(axes, rows[table])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        figure.savefig(folder / f"{table}.svg", metadata={"Date": None})
        plt.close(figure)
        written.append(f"{table}.svg")
    return written


def _line(axes: Any, points: Sequence[tuple[float, Any]], label: str, **style: Any) -> None:
    """A line through medians with their ranges, or through plain figures."""
    x = [place for place, _ in points]
    if points and isinstance(points[0][1], Mapping):
        middle = [one["median"] for _, one in points]
        below = [one["median"] - one["min"] for _, one in points]
        above = [one["max"] - one["median"] for _, one in points]
        axes.errorbar(x, middle, yerr=[below, above], marker="o", capsize=3, label=label, **style)
    else:
        axes.plot(x, [one for _, one in points], marker=".", linestyle="--", label=label, **style)


def _bars(axes: Any, bars: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """Horizontal, the first at the top; floors in grey."""
    names = [name for name, _ in bars]
    middle = [one["median"] for _, one in bars]
    below = [one["median"] - one["min"] for _, one in bars]
    above = [one["max"] - one["median"] for _, one in bars]
    colours = ["0.7" if name.startswith("floor") else "C0" for name in names]
    axes.barh(names, middle, xerr=[below, above], color=colours, capsize=3)
    axes.invert_yaxis()


def _logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)


def _startup(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, [(row["what"], row) for row in rows])
    axes.set(xlabel="ms", title="Whole commands")


def _stop(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, [(f"{row['what']}, {row['moves']} moves", row) for row in rows])
    axes.set(xlabel="ms", title="A small echo server moves")


def _steps(axes: Any, rows: Sequence[Row]) -> None:
    longest = sorted(rows, key=lambda row: -row["median"])[:20]
    _bars(axes, [(f"{row['side']}: {row['step'].split('.', 1)[1]}", row) for row in longest])
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="ms", title="The longest steps of its stop")


def _many(axes: Any, rows: Sequence[Row]) -> None:
    for what, label in (("stop_ms", "stop"), ("gap_ms", "gap of a client")):
        _line(axes, [(row["connections"], row[what]) for row in rows], label)
    _logarithmic(axes, "connections", "ms")
    axes.set_xscale("symlog", linthresh=10)  # there is a row of none
    axes.set_title("Connections, one in a hundred active")


def _descriptors(axes: Any, rows: Sequence[Row]) -> None:
    _line(axes, [(row["files"], row["stop_ms"]) for row in rows], "stop")
    floors = [(row["files"], row["floor"]) for row in rows if "floor" in row]
    _line(axes, floors, "floor: to look at each and open it, in C", color="0.5")
    _logarithmic(axes, "open files", "ms")
    axes.set_xscale("symlog", linthresh=10)  # there is a row of none


def _threads(axes: Any, rows: Sequence[Row]) -> None:
    _line(axes, [(row["threads"], row["stop_ms"]) for row in rows], "stop")
    _logarithmic(axes, "threads", "ms")


def _connections(axes: Any, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    makers = list(dict.fromkeys(row["who"] for row in rows))
    for number, who in enumerate(makers):
        mine = [row for row in rows if row["who"] == who]
        places = [cases.index(row["case"]) + 0.25 * number for row in mine]
        colour = "0.7" if who == "C" else f"C{number}"
        axes.barh(places, [row["three"] for row in mine], height=0.22, label=who, color=colour)
    axes.set_yticks([place + 0.25 for place in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="us of processor per connection", title="Freeze, export and rebuild")


def _precopy(axes: Any, rows: Sequence[Row]) -> None:
    for how, rate in dict.fromkeys((row["how"], row["rate"]) for row in rows):
        mine = [(row["mib"], row["stop"]) for row in rows if (row["how"], row["rate"]) == (how, rate)]
        _line(axes, mine, f"{how}, {rate} MB/s written")
    _line(axes, list({row["mib"]: row["memcpy"] for row in rows}.items()), "floor: memcpy of it all", color="0.5")
    _logarithmic(axes, "MiB of memory", "ms of stop")


def _lazy(axes: Any, rows: Sequence[Row]) -> None:
    for how in ("eager", "lazy"):
        _line(axes, [(row["mib"], row[f"{how} library"]) for row in rows], f"restore, {how}")
    _line(axes, [(row["mib"], row["memcpy"]) for row in rows], "floor: memcpy", color="0.5")
    _logarithmic(axes, "MiB of memory", "ms to the first answer")


def _files(axes: Any, rows: Sequence[Row]) -> None:
    floors = {"memcpy", "write", "read", "connection"}
    _bars(
        axes,
        [
            (f"{'floor: ' * (what in floors)}{what}, {row['place']}", figures)
            for row in rows
            for what, figures in row.items()
            if isinstance(figures, Mapping)
        ],
    )
    axes.set(xlabel="GB/s of memory", title=f"{rows[0]['mib']} MiB")


def _forward(axes: Any, rows: Sequence[Row]) -> None:
    names = {"plain": "floor: plain", "forwarded": "forwarded"}
    _bars(
        axes,
        [
            (f"{names[how]}, {'to' if way == 'in' else 'from'} the server", rows[-1][f"{how} {way}"])
            for way in ("in", "out")
            for how in names
        ],
    )
    axes.set(xlabel="GB/s", title="One connection, `--address forward`")


def _tree(axes: Any, rows: Sequence[Row]) -> None:
    for what in ("stop", "total"):
        _line(axes, [(row["processes"], row[what]) for row in rows], what)
    _line(axes, [(row["processes"], row["forks"]) for row in rows], "floor: as many forks", color="0.5")
    _logarithmic(axes, "processes", "ms")


#: by table
PLOTS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "startup": _startup,
    "stop": _stop,
    "steps": _steps,
    "many": _many,
    "descriptors": _descriptors,
    "threads": _threads,
    "connections": _connections,
    "precopy": _precopy,
    "lazy": _lazy,
    "files": _files,
    "forward": _forward,
    "tree": _tree,
}
