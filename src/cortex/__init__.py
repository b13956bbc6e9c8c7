"""cortex: one endpoint over a handful of mismatched GPU boxes.

What a plugin author imports first: `hookimpl` marks the functions that extend cortex; the hooks
themselves are in `cortex.hookspecs`. Importing this package loads neither a web server nor torch.
"""

from typing import Final

import pluggy

__version__: Final = "0.1.0"

hookimpl: Final = pluggy.HookimplMarker("cortex")

__all__ = ["__version__", "hookimpl"]
