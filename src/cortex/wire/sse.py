"""Server-sent events, both ways, incrementally and size-bounded.

Placeholder signature file: filled in by the owner of the module.
"""
