"""Chat templates write what transformers has them write, and what a hostile one wants is refused at once."""

from __future__ import annotations

import resource
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.errors import PromptError
from layerstream.text import bounds
from layerstream.text.prompt import PromptEncoder
from layerstream.text.template import ChatTemplate, template_literals
from layerstream.text.traced import SAID, WRITTEN, as_said, origin_of

from tests.text.conftest import make_byte_fallback_tokenizer

GROWING = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = NEXT %}{% endfor %}{{ ns.s }}"


def growing(start: str, following: str) -> str:
    return GROWING.replace("START", start).replace("NEXT", following)


HOSTILE = {
    "range": "{% for i in range(10**10) %}{% endfor %}",
    "power": "{{ 10**(10**8) }}",
    "squares": growing("3", "ns.s * ns.s"),
    "times": "{{ ('x' * 2000000000)|length }}",
    "list times": "{{ ([1] * 2000000000)|length }}",
    "sum": growing("'x'", "ns.s + ns.s"),
    "concatenation": growing("'x'", "ns.s ~ ns.s"),
    "block": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}",
    "macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + growing("'x'", "m(ns.s)"),
    "lists": growing("['x']", "[ns.s, ns.s]"),
    "tuples": growing("('x',)", "(ns.s, ns.s)"),
    "dicts": growing("{}", "{'a': ns.s, 'b': ns.s}").replace("{{ ns.s }}", "{{ ns.s|tojson }}"),
    "dict()": growing("{}", "dict(a=ns.s, b=ns.s)"),
    "varargs": "{% macro m(n) %}{% if n %}{{ m(n-1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}"
    "{{ m(40, 1) }}",
    "join": growing("'x'", "[ns.s, ns.s]|join"),
    "join method": growing("'x'", "'-'.join([ns.s, ns.s])"),
    "format": growing("'x'", "'{0}{0}'.format(ns.s)"),
    "percent": growing("'x'", "'%s%s' % (ns.s, ns.s)"),
    "replace": growing("'x'", "ns.s.replace('x', 'xx')"),
    "replace nothing": "{{ ('x'*1000000).replace('', 'y'*1000000)|length }}",
    "replace filter": growing("'x'", "ns.s|replace('x', 'xx')"),
    "center": "{{ 'x'|center(2000000000) }}",
    "ljust": "{{ 'x'.ljust(2000000000) }}",
    "zfill": "{{ 'x'.zfill(2000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "translate": "{{ ('a'*10000).translate({97: 'x'*1000000}) }}",
    "to_bytes": "{{ (1).to_bytes(2000000000, 'big') }}",
    "width": "{{ '{:2000000000}'.format('x') }}",
    "width in width": "{{ '{:{w}}'.format('x', w=2000000000) }}",
    "width of percent": "{{ '%2000000000s' % 'x' }}",
    "star of percent": "{{ '%*d' % (2000000000, 1) }}",
    "format filter": "{{ '%2000000000s'|format('x') }}",
    "indent": "{{ ('x\n'*100000)|indent(1000000) }}",
    "tojson": "{{ [1]|tojson(indent=2000000000) }}",
    "batch": "{{ [1]|batch(2000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(2000000000)|list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "map": "{{ range(99999)|map('center', 9999999)|list|length }}",
    "much output": "{% set s = 'x' * 9000000 %}{% for i in range(99) %}{{ s }}{% endfor %}",
    "much kept": "{% set s = 'x' * 9000000 %}{% macro m() %}"
    "{% for i in range(99) %}{{ s[1:] }}{% endfor %}{% endmacro %}{{ m() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop recursion": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "loops in loops": "{% for i in [1] %}" * 50 + "{% endfor %}" * 50,
    "source": "x" * (2**18 + 1),
    "zero": "{{ 1/0 }}",
    "encoding": "{{ 'x'.encode('nope') }}",
    "missing": "{{ messages[0].nope.nope }}",
    "attribute": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "namespace attribute": "{{ namespace(__class__=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "autoescape": "{% autoescape true %}x{% endautoescape %}",
    "syntax": "{% if %}",
    "long number": "{{ " + "9" * 5000 + " }}",
}  # fmt: skip
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "comparisons": "{% set s = 'x' * 9000000 %}{% set t = s ~ 'y' %}" + "{% for i in range(99999) %}" * 2
    + "{% if s == t %}{% endif %}" + "{% endfor %}" * 2,
    "words": "{% for i in range(99999) %}{% set x = ('x '*99999).split()|length %}{% endfor %}",
    "sums": "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = ns.a + [i] %}{% endfor %}",
}  # fmt: skip


def render(source: str) -> str:
    return ChatTemplate(source).render({"messages": as_said([{"role": "user", "content": "hi"}])})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PromptError, match="chat template"):
        render(HOSTILE[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (2**30 if sys.platform == "darwin" else 2**20), "a gigabyte"


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_comes_to_an_end_in_any_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS_LIMIT", 0.05)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            render(ENDLESS[name])
        except PromptError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert [type(error) for error in caught] == [PromptError]
    assert "seconds" in str(caught[0]) or "characters" in str(caught[0])


def test_a_namespace_is_printed_without_what_is_in_it() -> None:
    source = growing("1", "namespace(a=ns.s, b=ns.s)")
    assert render(source) == "<Namespace>"


def test_an_engine_refuses_what_its_template_cannot_do() -> None:
    tokenizer = make_byte_fallback_tokenizer()
    tokenizer.chat_template = HOSTILE["recursion"]
    encoder = PromptEncoder(tokenizer, max_context=None)
    for _ in range(2):
        with pytest.raises(PromptError, match=r"60 levels deep; .*chat_template\.jinja"):
            encoder.encode([{"role": "user", "content": "hi"}])
    assert encoder.encode("hi")


FRAGMENTS = (
    "{{ bos_token }}",
    "{{ messages[0].content | trim }}",
    "{{ '<|' + messages[0]['role'] + '|>' + messages[-1].content.strip() ~ eos_token }}",
    "{% for m in messages %}{% if loop.first %}[{% endif %}{{ m.content }}{{ loop.index }}/{{ loop.length }}"
    "{% if loop.last %}]{% elif m.role == 'user' %},{% else %};{% endif %}{% endfor %}",
    "{% for m in messages[::-1] if m.role != 'system' %}{{ m.content[:3] }}{% else %}none{% endfor %}",
    "{% set ns = namespace(found=false, text='') %}{% for m in messages %}"
    "{% if 'x' in m.content %}{% set ns.found = true %}"
    "{% set ns.text = ns.text + m.content.split('x')[-1].lstrip() %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.text }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}",
    "{{ messages | tojson }}{{ {'a': messages[0].content} | tojson(indent=2) }}",
    "{{ messages }}{{ messages[0].content | length }}{{ messages | length }}",
    "{% macro say(m, end='.') %}{{ m.content | upper }}{{ end }}{% endmacro %}"
    "{{ say(messages[0]) }}{{ say(messages[0], '!') }}",
    "{% set content %}{{ messages[0].content }}{% endset %}"
    "{{ content | replace('a', 'b') }}{{ content.replace('b', '') }}",
    "{{ 'yes' if messages[0].content is string and messages[0].name is not defined else 'no' }}",
    "{{ '%s: %s' % (messages[0].role, messages[0].content) }}{{ '{} {n}'.format(messages[0].content, n=3) }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    "{% filter trim %} {{ messages[0].content }} {% endfilter %}",
    "{{ messages[0].content | default('none') }}{{ messages[0].other | default('none') }}"
    "{{ (messages | last).content }}",
    "{%- if tools %}{{ tools[0].function.name }}{{ tools | tojson }}{% endif -%}  "
    "{{ add_generation_prompt }}{{ mood }}",
    "{{ dict(a=1).a }}{{ range(3) | list }}{{ messages[0].content.splitlines() }}{{ messages[0].content | indent(2) }}",
    "{{ 7 // 2 }}{{ 2 ** 5 }}{{ -3 % 5 }}{{ 1.5 * 2 }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ messages | first | string }}",
)  # fmt: skip
LINES = st.lists(st.sampled_from(["a fox", "x", " ", "\n", "ß", '"', "<b>", "{{"]), max_size=5).map("".join)


@settings(max_examples=40)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4),
    contents=st.lists(LINES, min_size=1, max_size=4),
    has_tools=st.booleans(),
)
def test_a_template_writes_what_it_writes_in_transformers(
    fragments: list[str], contents: list[str], has_tools: bool
) -> None:
    tokenizer: Any = make_byte_fallback_tokenizer_once()
    tokenizer.chat_template = "\n".join(fragments)
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}] if has_tools else None
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "mood": "calm"}
    expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    found = PromptEncoder(tokenizer, max_context=None).apply_chat_template(messages, **options)
    assert found == expected


_made: list[Any] = []


def make_byte_fallback_tokenizer_once() -> Any:
    if not _made:
        _made.append(make_byte_fallback_tokenizer())
    return _made[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("<|{{ m.role }}|>{{ m.content }}<|end|>", "hi"),
        ("{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}", "hi"),
        ("{% set text = m.content ~ '.' %}{{ text.split('h')[1] }}", "i"),
        ("{{ [m.content, 'x'] | join('<|sep|>') }}", "hi"),
        ("{% macro a(b) %}<|x|>{{ b }}{% endmacro %}{{ a(m.content) }}", "hi"),
        ("{% filter upper %}a{{ m.content }}{% endfilter %}", "HI"),
        ("{{ {'content': m.content} | tojson }}", '{"content": "hi"}'),
        ("{{ [m.content] }}", "['hi']"),
        ("{{ 'a%sb' % m.content }}", "ahib"),
        ("{{ 'a{}b'.format(m.content) }}", "ahib"),
        ("{{ m.content | center(6) }}", "  hi  "),
        ("{{ m.content | escape }}{{ 'x' | escape }}", "hi"),
        ("{{ m.content if m.content == 'hi' else '<|x|>' }}", "hi"),
        ("{{ m.missing | default('<|x|>') }}{{ ['<|x|>', m.content] | first }}", ""),
        ("{{ bos }}{{ {'user': '<|user|>'}[m.role] }}{{ {'hi': '<|x|>'}.get(m.content) }}", ""),
    ],
)
def test_what_was_said_is_known_in_what_was_written(source: str, said: str) -> None:
    text = ChatTemplate(source).render(
        {"m": as_said({"role": "user", "content": "hi"}) | {"role": "user"}, "bos": "<s>"}
    )
    origin = origin_of(text)
    assert "".join(letter for letter, kind in zip(text, origin, strict=True) if kind == SAID) == said
    assert len(origin) == len(text)
    assert set(origin) <= {SAID, WRITTEN}


def test_all_that_a_template_writes_by_itself() -> None:
    source = "<|a|>{{ '<|b|>' + x ~ '<|c|>' }}{% if y == '<|d|>' %}{% endif %}{# <|e|> #}"
    assert template_literals(source).split("\0") == ["<|a|>", "<|b|>", "<|c|>", "<|d|>"]
    assert template_literals("{% if %}") == ""


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox "}]


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_the_last_message_goes_on(trim: str) -> None:
    tokenizer = make_byte_fallback_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content" + trim + " }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = PromptEncoder(tokenizer, max_context=None)
    text = encoder.apply_chat_template(CHAT, add_generation_prompt=False, continue_final_message=True)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False, continue_final_message=True)
    assert text.endswith("the fox" if trim else "the fox ")
    with pytest.raises(PromptError, match="add_generation_prompt=False"):
        encoder.apply_chat_template(CHAT, continue_final_message=True)
    with pytest.raises(PromptError, match="'reasoning_content'"):
        encoder.apply_chat_template(CHAT, add_generation_prompt=False, continue_final_message="reasoning_content")


_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        _PARTS,
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}",
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{{ m.content[0].text }}{% endif %}</s>{% endfor %}",
    ],
)
def test_a_template_that_reads_parts_is_given_parts(source: str) -> None:
    """Templates of models that read images leave out contents that are plain text."""
    tokenizer = make_byte_fallback_tokenizer_once()
    tokenizer.chat_template = source
    text = PromptEncoder(tokenizer, max_context=None).apply_chat_template(CHAT, add_generation_prompt=False)
    assert text == "<|user|>hello</s><|assistant|>the fox </s>"
    assert SAID in origin_of(text)
