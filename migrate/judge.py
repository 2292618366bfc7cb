"""May an address move? What speaks against it, as verdicts: its kind, the channel to the target, others that use it."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Collection, Mapping
from typing import Final

from checkpoint.verdict import Status, Verdict
from migrate import forwardstore
from migrate.addresses import AddressRecord, Configuration, link_name
from migrate.dependents import Dependents
from migrate.errors import (
    AddressCarriesControl,
    AddressConfiguredTwice,
    AddressInUseByOthers,
    AddressNotMovable,
    AddressUsedByHost,
    ForwardedElsewhere,
)
from migrate.rtnetlink import Netlink
from migrate.usage import AddressUser
from tcpstate.errors import TcpmigError
from tcpstate.kernel.bpf.steer import Role
from tcpstate.kernel.rtnetlink import (
    LINK_HEADER,
    AddressFlag,
    AddressOrigin,
    LinkAttribute,
    MessageType,
    attributes,
    unpacked_address,
)

__all__ = ["AddressPolicy", "judge", "tunnel_ends"]

_KIND = "address"
_SHOWN = 3

_GRE: Final = (6,)  # IFLA_GRE_LOCAL
_IPTUN: Final = (2,)  # IFLA_IPTUN_LOCAL
_VTI: Final = (4,)  # IFLA_VTI_LOCAL
#: kinds of tunnels, and which of their attributes is the end at this host (linux/if_link.h, linux/if_tunnel.h)
_NEAR_END: Final[Mapping[bytes, tuple[int, ...]]] = {
    b"vxlan": (4, 17),  # IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6
    b"gre": _GRE,
    b"gretap": _GRE,
    b"erspan": _GRE,
    b"ip6gre": _GRE,
    b"ip6gretap": _GRE,
    b"ip6erspan": _GRE,
    b"ipip": _IPTUN,
    b"sit": _IPTUN,
    b"ip6tnl": _IPTUN,
    b"vti": _VTI,
    b"vti6": _VTI,
}


class AddressPolicy(enum.Enum):
    """``--address-policy``: what to do where others than the tree use an address that would move."""

    REFUSE = "refuse"
    ALLOW = "allow"


def judge(
    record: AddressRecord,
    here: Configuration,
    control: Mapping[str, str],
    users: Collection[AddressUser],
    depend: Dependents,
    tunnels: Collection[str],
    policy: AddressPolicy,
) -> list[Verdict]:
    """At least one verdict on one address.

    users    sockets outside the tree that are on it
    tunnels  interfaces that end on it
    """
    text = str(record)
    refused = _unmovable(record, here)
    if refused is None and record.address in control:
        refused = AddressCarriesControl(f"it carries {control[record.address]}", object=text)
    if refused is not None:
        return [Verdict.refuse(refused, _KIND)]
    errors = _sharing(text, users, depend, tunnels)
    if errors and policy is AddressPolicy.REFUSE:
        return [Verdict.refuse(error, _KIND) for error in errors]
    found = [Verdict(subject=text, kind=_KIND, status=Status.WARN, text=e.message, fix=e.fix) for e in errors]
    told = [Verdict(subject=text, kind=_KIND, status=Status.WARN, text=each) for each in _told(record, depend)]
    return [*found, *told] or [Verdict(subject=text, kind=_KIND)]


def _unmovable(record: AddressRecord, here: Configuration) -> TcpmigError | None:
    """Why no policy can move it."""
    text = str(record)
    address = ipaddress.ip_address(record.address)
    holders = here.all(record.address)
    if forwardstore.of_address(record.address, Role.AWAY) is not None:
        return ForwardedElsewhere("it is forwarded to here", object=text)
    if len(holders) > 1:
        names = " and ".join(interface.name for interface in holders)
        return AddressConfiguredTwice(f"it is configured on {names}", object=text)
    if address.is_link_local or address.is_multicast:
        return AddressNotMovable("it belongs to its interface", object=text)
    if record.temporary:
        return AddressNotMovable("it is temporary, made by the kernel for this interface", object=text)
    if address.version == 6 and record.protocol == AddressOrigin.KERNEL_RA:
        return AddressNotMovable("a router advertises its subnet, and would make it again", object=text)
    if record.flags & AddressFlag.MANAGETEMPADDR and any(a.temporary for i in holders for a in i.addresses):
        return AddressNotMovable("the kernel has made temporary addresses from it, which would end", object=text)
    return None


def _sharing(
    text: str, users: Collection[AddressUser], depend: Dependents, tunnels: Collection[str]
) -> list[TcpmigError]:
    """Who else uses it."""
    found: list[TcpmigError] = []
    if users:
        shown = "; ".join(f"{u}, pid {' '.join(map(str, u.pids)) or 'hidden'}" for u in list(users)[:_SHOWN])
        more = f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else ""
        found.append(AddressInUseByOthers(f"sockets outside the tree use it: {shown}{more}", object=text))
    if depend.hosts:
        named = "; ".join(map(str, depend.hosts[:_SHOWN]))
        found.append(AddressUsedByHost(f"{len(depend.hosts)} routes have it as their source: {named}", object=text))
    if tunnels:
        found.append(AddressUsedByHost(f"tunnels end on it: {', '.join(tunnels)}", object=text))
    return found


def _told(record: AddressRecord, depend: Dependents) -> list[str]:
    """What else there is to know about an address that moves."""
    texts = []
    if routes := [route for route in depend.routes if route not in depend.hosts]:
        named = "; ".join(map(str, routes[:_SHOWN]))
        texts.append(f"{len(routes)} routes that only it can use go with it: {named}")
    texts += [f"{what} stays here" for what in depend.left]
    if record.limited:
        texts.append("it expires: whoever renews it on this host (a DHCP client) may bring it back")
    return texts


def tunnel_ends(netlink: Netlink) -> dict[str, list[str]]:
    """The interfaces that are tunnels, by the address of this host on which they end."""
    found: dict[str, list[str]] = {}
    for body in netlink.dump(MessageType.GETLINK, LINK_HEADER.pack(0, 0, 0, 0, 0)):
        told = attributes(body, LINK_HEADER.size)
        info = attributes(told.get(LinkAttribute.LINKINFO, b""))
        kind = info.get(LinkAttribute.INFO_KIND, b"").partition(b"\0")[0]
        data = attributes(info.get(LinkAttribute.INFO_DATA, b""))
        for number in _NEAR_END.get(kind, ()):
            if (packed := data.get(number)) and any(packed):
                found.setdefault(unpacked_address(packed), []).append(link_name(told))
    for record in forwardstore.forwards():
        if record.role is Role.HOME:
            # its connections live elsewhere, and need it here
            for address in record.addresses:
                found.setdefault(address, []).append(f"forwarding {record.forward}")
    return found
