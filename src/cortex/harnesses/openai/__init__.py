"""The OpenAI API as a plugin: chat completions and the model listing."""

from collections.abc import Callable

from cortex import hookimpl
from cortex.harnesses.openai.dialect import OpenAIDialect
from cortex.hookspecs import Dialect

__all__ = ["OpenAIDialect", "cortex_register_dialects"]


@hookimpl
def cortex_register_dialects(register: Callable[[Dialect], None]) -> None:
    register(OpenAIDialect())
