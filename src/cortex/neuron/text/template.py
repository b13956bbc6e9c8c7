"""The chat template of a model: a conversation in, the prompt's text out.

Knows which of a model's templates to take and in which form it wants message contents. Knows no token
ids; how templates are kept in bounds is the sandbox's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from jinja2 import Template, TemplateError

from cortex.neuron.text.sandbox import Sandbox
from cortex.wire.errors import BadRequest

DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"
"""The name under which a model keeps a separate template for requests with tools."""

_PROBE: Final = "probe-5f3a"


class ChatTemplate:
    """All templates of a model by name; without any, rendering is refused.

    `special_tokens` are variables such as `bos_token`. `now` is the local time for `strftime_now`.

    Contents that are a list of text parts go to the template as they are if it understands them, else
    their texts are joined with nothing between them. Plain texts become a list of one part only for a
    template that understands nothing else. Which of these holds is found out by rendering a probe.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._sandbox = Sandbox(now)
        self._templates = {name: self._compile(source) for name, source in sources.items()}
        self._forms = {name: self._find_forms(template) for name, template in self._templates.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt. Raises BadRequest with the template's own complaint."""
        name = WITH_TOOLS if tools and WITH_TOOLS in self._templates else DEFAULT
        template = self._templates.get(name)
        if template is None:
            raise BadRequest("This model has no chat template, so it cannot chat; use one tuned for chat.")
        if isinstance(template, TemplateError):
            raise BadRequest(f"This model's chat template cannot be read: {template}.")
        takes_text, takes_parts = self._forms[name]
        shaped = [_shape(message, takes_text, takes_parts) for message in messages]
        try:
            return self._run(template, shaped, tools, add_generation_prompt, variables)
        except Exception as error:  # a template can raise whatever Python can
            raise BadRequest(_complaint(error), param="messages") from None

    def _run(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        own = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._sandbox.render(template, {**self._special_tokens, **variables, **own})

    def _compile(self, source: str) -> Template | TemplateError:
        try:
            return self._sandbox.compile_bounded(source)
        except TemplateError as error:
            return error
        except RecursionError:
            return TemplateError("it is nested too deeply")

    def _find_forms(self, template: Template | TemplateError) -> tuple[bool, bool]:
        """Whether the template shows contents given as text, and contents given as parts."""
        if isinstance(template, TemplateError):
            return True, False
        as_text = self._probe(template, _PROBE)
        as_parts = self._probe(template, [{"type": "text", "text": _PROBE}])
        # A template that takes everything for text shows the list in Python's or JSON's own notation.
        takes_parts = _PROBE in as_parts and f"'{_PROBE}'" not in as_parts and f'"{_PROBE}"' not in as_parts
        return _PROBE in as_text or not takes_parts, takes_parts

    def _probe(self, template: Template, content: Any) -> str:
        try:
            return self._run(template, [{"role": "user", "content": content}], None, True, {})
        except Exception:  # it does not take this form; what it raises does not matter
            return ""


def _shape(message: Mapping[str, Any], takes_text: bool, takes_parts: bool) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, str) and not takes_text:
        return {**message, "content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and not takes_parts:
        return {**message, "content": "".join(part.get("text") or "" for part in content)}
    return message


def _complaint(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return f"This model's chat template refuses the conversation: {said.rstrip('.')}."
