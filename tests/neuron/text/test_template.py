"""Chat templates: equal to transformers' rendering, clear when they refuse, bounded when they run away."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cortex.neuron.text.codec import codec_from_gguf
from cortex.neuron.text.template import ChatTemplate
from cortex.neuron.weights.gguf import read_header
from cortex.wire.errors import BadRequest

NOON = datetime.datetime(2026, 3, 1, 12, 0)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "description": "Für <b>\"städte\"</b> & 'dörfer'",
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([USER], None),
    "system and turns": (
        [
            {"role": "system", "content": "Be brief. "},
            USER,
            {"role": "assistant", "content": "  yo\n"},
            {"role": "user", "content": "ünï 🙂 <|im_end|> {{ x }}"},
        ],
        None,
    ),
    "tools offered": ([USER], [TOOL, TOOL]),
    "tools used": (
        [
            {"role": "system", "content": "S"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": '{"t": 3}'},
            {"role": "tool", "tool_call_id": "c2", "content": "x"},
            {"role": "assistant", "content": "done", "reasoning_content": "thought"},
            USER,
        ],
        [TOOL],
    ),
}
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>' }}\n"
    "{% endfor %}\n{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LITERAL = {
    "chatml": CHATML,
    "blocks and whitespace": (
        "{{ bos_token }}\n    {% if tools is not none %}\n{{ tools | tojson(indent=2) }}\n    {% endif %}\n"
        "{% set ns = namespace(count=0, text='') %}\n"
        "{% for m in messages -%}\n  {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "  {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}{% set ns.text = ns.text ~ '|' ~ m.role ~ loop.index %}\n"
        "  [{{ '%02d' % loop.index0 }}] {{ (m.content or '') | trim }}{{ eos_token }}\n{% endfor %}\n"
        "{{ ns.count * 2 }}{{ ns.text }}{{ documents is none }}{{ '=' * 5 }}{{ 2 ** 10 }}{{ unk_token }}"
    ),
    "calls and reasoning": (
        "{% for m in messages %}{% generation %}{{ m.reasoning_content }}{{ m.thinking }}{% endgeneration %}"
        "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function | tojson }}"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endif %}"
        "{% endfor %}{{ dict(a=1) | tojson }}{{ messages[0].content.split('h') }}{{ [1, 2] + [3] }}"
    ),
}


def template(source: str, **sources: str) -> ChatTemplate:
    return ChatTemplate({"default": source, **sources}, special_tokens=SPECIAL, now=lambda: NOON)


def complaint(source: str, messages: list[dict[str, Any]] | None = None) -> str:
    with pytest.raises(BadRequest) as refusal:
        template(source).render(messages or [USER])
    return refusal.value.message


@pytest.mark.slow
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("source", LITERAL)
def test_a_template_renders_as_transformers_renders_it(source: str, conversation: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

    messages, tools = CONVERSATIONS[conversation]
    for prompt in (True, False):
        expected, _ = render_jinja_template(
            [messages],
            chat_template=LITERAL[source],
            tools=tools,
            add_generation_prompt=prompt,
            **SPECIAL,
        )
        aliased = [
            {**message, "thinking": message["reasoning_content"]}
            if "reasoning_content" in message
            else message
            for message in messages
        ]
        rendered = template(LITERAL[source]).render(aliased, tools=tools, add_generation_prompt=prompt)
        assert rendered == expected[0]


CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "w", "arguments": {"city": "Z\u00fcrich"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "3"},
]
EACH = "{%- for m in messages %}"
CALLS = "{%- for c in m.tool_calls or [] %}"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (  # as DeepSeek-R1-Distill has it: a call is shown beside null only, its arguments joined as text
            EACH + "{%- if m.content is none %}" + CALLS + "{{ '```' + c.function.arguments + '```' }}"
            "{%- endfor %}{%- else %}{{ m.content + '|' }}{%- endif %}{%- endfor %}",
            'hi|```{"city": "Z\u00fcrich"}```3|',
        ),
        (
            EACH + CALLS + "{{ c.function.arguments }}{% endfor %}{% endfor %}",
            '{"city": "Z\u00fcrich"}',
        ),
        (
            EACH + CALLS + "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
            '{"city": "Z\u00fcrich"}',
        ),
        (
            EACH + CALLS + "{{ c.function.arguments.city }}{% endfor %}{% endfor %}",
            "Z\u00fcrich",
        ),
        (EACH + "{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}", "<user>hi<assistant><tool>3"),
        (EACH + "{{ m.content }}|{% endfor %}", "hi||3|"),
    ],
    ids=["joined beside null", "printed", "as JSON", "as an object", "content joined", "content printed"],
)
def test_calls_go_to_a_template_in_the_form_that_it_takes(source: str, wanted: str) -> None:
    assert template(source).render(CALLED) == wanted


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2_path", "qwen_coder_path"])
def test_a_real_template_renders_as_transformers_renders_it(
    model: str, request: pytest.FixtureRequest, transformers_tokenizer: Callable[[Path], Any]
) -> None:
    path: Path = request.getfixturevalue(model)
    reference = transformers_tokenizer(path)
    codec = codec_from_gguf(read_header(path).metadata)
    knows_tools = "tools" in reference.chat_template
    for messages, tools in CONVERSATIONS.values():
        if tools and not knows_tools:
            continue
        for prompt in (True, False):
            expected = reference.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
            rendered = codec.render(messages, tools=tools, add_generation_prompt=prompt)
            assert rendered == expected


def test_a_model_without_template_says_so() -> None:
    empty = ChatTemplate({}, special_tokens={})
    with pytest.raises(BadRequest, match="no chat template"):
        empty.render([USER])


def test_a_template_of_its_own_serves_requests_with_tools() -> None:
    both = template("plain", tool_use="with {{ tools | length }}")
    assert both.render([USER]) == "plain"
    assert both.render([USER], tools=[TOOL]) == "with 1"
    assert template("plain", rag="other").render([USER], tools=[TOOL]) == "plain"


def test_the_clock_is_the_one_that_was_given() -> None:
    assert template("{{ strftime_now('%d %B %Y') }}").render([USER]) == "01 March 2026"


def test_a_long_complaint_reaches_the_client_in_part() -> None:
    assert len(complaint("{{ raise_exception('x' * 100000) }}")) < 3000


def test_other_variables_reach_the_template() -> None:
    source = "{{ enable_thinking }}{{ tools is none }}{{ add_generation_prompt }}"
    assert template(source).render([USER], enable_thinking=False) == "FalseTrueFalse"


# --- what contents look like ----------------------------------------------------------------------

PARTS = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
FOR_PARTS = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
FOR_BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "from_parts", "from_text"),
    [
        (CHATML, "<|im_start|>user\none two<|im_end|>\n", "<|im_start|>user\nhi<|im_end|>\n"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "one two", "hi"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", '"one two"', '"hi"'),
        (FOR_PARTS, "<one ><two>", "<hi>"),
        (FOR_BOTH, "<one ><two>", "hi"),
    ],
    ids=["adds", "prints", "as json", "only parts", "both"],
)
def test_contents_come_in_the_form_that_the_template_reads(
    source: str, from_parts: str, from_text: str
) -> None:
    assert template(source).render([PARTS]) == from_parts
    assert template(source).render([USER]) == from_text


# --- refusals -------------------------------------------------------------------------------------


def test_the_template_s_own_complaint_reaches_the_client() -> None:
    said = complaint("{{ raise_exception('Roles must alternate!') }}")
    assert "chat template" in said
    assert "Roles must alternate!" in said


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ messages[7].role }}",
        "{{ 'a' + 1 }}",
        "{{ messages | nosuchfilter }}",
        "{% if %}",
        "{{ 'x' | int(1, 2, 3, 4) }}",
        "{{ messages.foo() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_is_a_bad_request(source: str) -> None:
    assert "chat template" in complaint(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__func__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__subclasses__() }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '%s'.__mod__ }}",
        "{{ messages.append(1) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__name__ }}",
    ],
)
def test_no_way_leads_out_of_the_sandbox(source: str) -> None:
    try:
        rendered = template(source).render([USER])
    except BadRequest:
        return
    assert rendered == ""


@pytest.mark.parametrize(
    "source",
    ["{% set ns = namespace(_x=1) %}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}"],
)
def test_a_namespace_holds_no_underscore_names(source: str) -> None:
    assert "namespace cannot hold" in complaint(source)


def test_messages_are_not_changed_by_a_template() -> None:
    messages = [dict(USER)]
    with pytest.raises(BadRequest):
        template("{{ messages[0].update(role='x') }}").render(messages)
    assert messages == [USER]


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 100}] * 4000
    assert len(template(CHATML).render(messages)) > 2_000_000
