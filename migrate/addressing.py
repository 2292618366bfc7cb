"""What ``--address`` means for one migration: addresses that move (:mod:`migrate.takeover`), or are forwarded
(:mod:`migrate.forwarding`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from checkpoint.verdict import refusals
from migrate.errors import TargetRefused, from_remote
from migrate.forwarding import OPTION, SourceForward, plan_forward
from migrate.messages import Needs
from migrate.rtnetlink import Netlink
from migrate.summary import SourceOptions
from migrate.takeover import AddressPlan, consider

__all__ = ["plan_addresses"]


def plan_addresses(
    netlink: Netlink,
    migration: str,
    needs: Needs,
    control: Mapping[str, str],
    host: str,
    options: SourceOptions,
    offered: Collection[str],
) -> tuple[SourceForward, AddressPlan]:
    """What is forwarded, if anything, and what moves; nothing is changed. Raises the first refusal.

    control  from :func:`migrate.takeover.control_addresses`
    offered  features of the target
    """
    if options.address == OPTION:
        return plan_forward(netlink, migration, needs, control, host, options.forward_to, offered)
    pids = {pid for tree in needs.trees for pid in tree.pids}
    plan = consider(netlink, options.address, needs.used_addresses, needs.anywhere, pids, control, options.policy)
    for refusal in refusals(plan.verdicts):
        raise from_remote(refusal.code, refusal.text, refusal.subject, refusal.fix, otherwise=TargetRefused, where="")
    return SourceForward(), plan
