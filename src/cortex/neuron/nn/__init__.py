"""Layers: plain torch modules that take a step plan as an argument and hold no request state."""
