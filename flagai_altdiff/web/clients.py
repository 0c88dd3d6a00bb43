"""Who asks: what the queue is fair between."""

from __future__ import annotations

import ipaddress

from fastapi import Request

_LONGEST = 80


def client_of(request: Request, user: str = "") -> str:
    """A client's name for the queue.

    Its address; and on this machine, where proxies and programs are, the user or ``X-Client`` that they name as well.
    From elsewhere nobody can have a second place in the queue by another name.
    """
    host = request.client.host if request.client else ""
    named = user or request.headers.get("x-client", "")
    return f"{host} {named[:_LONGEST]}" if named and is_loopback(host) else host


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
