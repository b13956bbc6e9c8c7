"""Test doubles that ship with the package, for cortex's own tests and for those of plugins."""

from cortex.testing.asgi_client import AsgiClient, AsgiExchange, AsgiReply
from cortex.testing.clock import ManualClock
from cortex.testing.fake_node import FakeNode
from cortex.testing.memory import MemoryNetwork, memory_connect
from cortex.testing.scripted import ByteCodec, ScriptedEngine, ScriptedFactory, ScriptedModel
from cortex.testing.splits import every_split

__all__ = [
    "AsgiClient",
    "AsgiExchange",
    "AsgiReply",
    "ByteCodec",
    "FakeNode",
    "ManualClock",
    "MemoryNetwork",
    "ScriptedEngine",
    "ScriptedFactory",
    "ScriptedModel",
    "every_split",
    "memory_connect",
]
