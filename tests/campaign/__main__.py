"""python -m tests.campaign [NAME...]: the campaigns with other numbers than `make campaign`. As root."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from tests.campaign.run import CAMPAIGNS, STATE, run
from tests.workloads.move import by_tcpmig, pretend


def main() -> int:
    """0 if nothing was wrong in any."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=f"State files are in {STATE}.")
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(c.name for c in CAMPAIGNS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moves", type=int, help="in place of what each has")
    parser.add_argument("--rate", type=float, default=0, help="MB/s in each direction; 0 = full speed")
    parser.add_argument(
        "--pretend", type=float, metavar="MS", help="do not migrate: stop the server for MS milliseconds"
    )
    given = parser.parse_args()
    unknown = set(given.names) - {campaign.name for campaign in CAMPAIGNS}
    if unknown:
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        print("The campaigns make hosts of namespaces: run them as root.", file=sys.stderr)
        return 2
    bad = 0
    for campaign in CAMPAIGNS:
        if given.names and campaign.name not in given.names:
            continue
        mover = by_tcpmig()
        if given.pretend is not None:
            mover = pretend(given.pretend)
            campaign = dataclasses.replace(campaign, name=f"{campaign.name}-pretended")
        if given.moves:
            campaign = dataclasses.replace(campaign, moves=given.moves)
        state = run(campaign, seed=given.seed, rate=given.rate, mover=mover)
        bad += sum(1 for leg in state["legs"] if leg["problems"])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
