"""A run over one target: in chunks, each with a seed of its own, so that it can be interrupted and gone on with."""

from __future__ import annotations

import json
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

__all__ = ["STATE", "chunk", "run"]

STATE = Path(__file__).resolve().parents[2] / "build/fuzz"
CHUNK = 10_000
MOST_BAD = 20  # inputs that are kept of one target before it is given up


def chunk(name: str, seed: str, count: int) -> list[tuple[bytes, str]]:
    """So many inputs: those that raised something, and what."""
    target, chance, bad = TARGETS[name], random.Random(seed), []
    for _ in range(count):
        data = mutated(target, chance)
        try:
            target.run(data)
        except Exception:  # that is what is looked for
            bad.append((data, traceback.format_exc()))
    return bad


def run(name: str, *, inputs: int, seed: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is left of so many inputs; {name, seed, done, seconds, bad: [{input, error}]}."""
    file = STATE / f"{name}-{seed}.json"
    state: dict[str, Any] = {"name": name, "seed": seed, "done": 0, "seconds": 0.0, "bad": []}
    if file.exists():
        state = json.loads(file.read_text())
    STATE.mkdir(parents=True, exist_ok=True)
    while state["done"] < inputs and len(state["bad"]) < MOST_BAD:
        begun = time.monotonic()
        count = min(CHUNK, inputs - state["done"])
        for data, error in chunk(name, f"{seed}/{name}/{state['done']}", count):
            state["bad"].append({"input": data.hex(), "error": error})
        state["done"] += count
        state["seconds"] += time.monotonic() - begun
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.replace(file)
    rate = state["done"] / max(state["seconds"], 1e-9)
    say(f"{name}: {state['done']} inputs, {rate:.0f} per second, {len(state['bad'])} wrong")
    return state
