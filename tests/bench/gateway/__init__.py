"""Compares the gateway's cost with that of other gateways on this machine: `make bench`."""
