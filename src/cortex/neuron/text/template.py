"""The chat template of a model: a conversation in, the prompt's text out.

Knows which of a model's templates to take and in which form it wants message contents. Knows no token
ids; how templates are kept in bounds is the sandbox's business.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from jinja2 import Template, TemplateError

from cortex.neuron.text.sandbox import Sandbox
from cortex.wire.errors import BadRequest

DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"
"""The name under which a model keeps a separate template for requests with tools."""

_PROBE: Final = "probe-5f3a"
_MAX_COMPLAINT: Final = 2000
"""Characters of what a template may say to the client where it refuses."""
_CALL: Final = {"name": "look_up", "arguments": {"key": _PROBE}}
_HISTORY: Final[Sequence[Mapping[str, Any]]] = (
    {"role": "user", "content": "Look it up."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call00001", "type": "function", "function": _CALL}],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "Found."},
)


class _Forms(NamedTuple):
    """Whether a template takes contents as text and as parts, null as a content beside tool calls, and the
    arguments of those as objects; else it gets an empty text, and the arguments' JSON."""

    text: bool = True
    parts: bool = False
    null: bool = True
    objects: bool = True


class ChatTemplate:
    """All templates of a model by name; without any, rendering is refused.

    `special_tokens` are variables such as `bos_token`. `now` is the local time for `strftime_now`.

    Contents that are a list of text parts go to the template as they are if it understands them, else
    their texts are joined with nothing between them. Plain texts become a list of one part only for a
    template that understands nothing else. A template that joins the arguments of tool calls to its own
    text, or the content beside them, gets text for these too. Which of these holds is found out by rendering
    probes.
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
        shaped = [_shape(message, self._forms[name]) for message in messages]
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

    def _find_forms(self, template: Template | TemplateError) -> _Forms:
        if isinstance(template, TemplateError):
            return _Forms()
        as_text = self._probe(template, [{"role": "user", "content": _PROBE}])
        parts = [{"type": "text", "text": _PROBE}]
        as_parts = self._probe(template, [{"role": "user", "content": parts}])
        takes_parts = as_parts is not None and _is_shown(as_parts) and f'"{_PROBE}"' not in as_parts
        takes_text = not takes_parts or (as_text is not None and _PROBE in as_text)
        return self._find_call_forms(template, _Forms(takes_text, takes_parts))

    def _find_call_forms(self, template: Template, forms: _Forms) -> _Forms:
        """The first ones with which a call is shown as it should be, else those with which nothing breaks."""
        shown: list[tuple[_Forms, str]] = []
        for null, objects in itertools.product((True, False), repeat=2):
            tried = forms._replace(null=null, objects=objects)
            text = self._probe(template, [_shape(message, tried) for message in _HISTORY])
            if text is not None and "None" not in text:
                shown.append((tried, text))
        good = [tried for tried, text in shown if _is_shown(text)]
        return (good or [tried for tried, _ in shown] or [forms])[0]

    def _probe(self, template: Template, messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return self._run(template, messages, None, True, {})
        except Exception:  # it does not take this form; what it raises does not matter
            return None


def _is_shown(text: str) -> bool:
    """The probe is there, and not in a list or an object in Python's notation."""
    return _PROBE in text and f"'{_PROBE}'" not in text


def _shape(message: Mapping[str, Any], forms: _Forms) -> Mapping[str, Any]:
    calls, content = message.get("tool_calls"), message.get("content")
    if calls and not forms.objects:
        message = {**message, "tool_calls": [_with_text_arguments(call) for call in calls]}
    if content is None and calls and not forms.null:
        content = ""
    if isinstance(content, str) and not forms.text:
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not forms.parts:
        content = "".join(part.get("text") or "" for part in content)
    return message if content is None else {**message, "content": content}


def _with_text_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _complaint(error: Exception) -> str:
    said = str(error)[:_MAX_COMPLAINT] or type(error).__name__
    return f"This model's chat template refuses the conversation: {said.rstrip('.')}."
