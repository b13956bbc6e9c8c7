"""Every way in which a network may cut a message in two, and the extremes."""

from __future__ import annotations

from collections.abc import Iterator


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """`data` whole, byte by byte, and cut in two at each place. The pieces joined are `data`."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
