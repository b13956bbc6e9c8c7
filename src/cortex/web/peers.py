"""Who is at the other end: is it this machine itself, and which bearer token did it send."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final

FORWARDING_HEADERS: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Their presence means that a proxy asks on behalf of somebody whose address we do not know."""


def is_direct_loopback(client: tuple[str, int] | None, headers: Mapping[str, str]) -> bool:
    """True if the peer is on this machine and asks for itself."""
    if client is None or any(name in headers for name in FORWARDING_HEADERS):
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def bearer(headers: Mapping[str, str]) -> str | None:
    """The token of `Authorization: Bearer`, scheme in any case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
