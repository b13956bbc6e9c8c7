"""HTTP of our own: an ASGI service on one side, an h11 client on the other.

Knows only `wire.errors` of cortex.
"""
