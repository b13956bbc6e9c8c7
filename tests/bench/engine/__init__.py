"""Compares the engine with its peers, and with what it promises: `make bench-engine`."""
