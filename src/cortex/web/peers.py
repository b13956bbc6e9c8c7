"""Who is at the other end: is it this machine itself, and which bearer token did it send."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

FORWARDING_HEADERS: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Their presence means that a proxy asks on behalf of somebody whose address we do not know."""


def is_direct_loopback(client: tuple[str, int] | None, headers: Mapping[str, str]) -> bool:
    """True if the peer is on this machine and asks for itself.

    A browser on this machine that runs another site's page asks for that site, as its `origin` says.
    """
    if client is None or any(name in headers for name in FORWARDING_HEADERS):
        return False
    if "origin" in headers and not _is_loopback(_host(headers["origin"])):
        return False
    return _is_loopback(client[0])


def _host(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def bearer(headers: Mapping[str, str]) -> str | None:
    """The token of `Authorization: Bearer`, scheme in any case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
