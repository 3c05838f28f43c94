"""Whatever a model says within the grammar of a turn reads back as what it means, in every family's form."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.chat.formats import FORMATS, find_format
from layerstream.chat.messages import plain_messages
from layerstream.chat.reader import CallPart, Reply, Text, gather
from layerstream.chat.turn import Turn, TurnMaker
from layerstream.errors import PromptError, ToolError
from layerstream.text.prompt import PromptEncoder
from layerstream.text.response_format import Grammars

from tests.chat.families import FAMILIES, make_turns
from tests.models import make_tokenizer

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds documents.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "count": {"type": "integer"},
                "tags": {"type": "array", "items": {"enum": ["a", "}"]}},
            },
            "required": ["query"],
        },
    },
}  # fmt: skip
NOW = {"name": "now", "description": "The time."}
USER = [{"role": "user", "content": "Where is Brenvik?"}]


def say(name: str, turn: Turn, seed: int, longest: int = 300) -> tuple[str, bool]:
    """A random answer within the grammar, rather short; whether it came to its end."""
    _, tokenizer, grammars = make_turns(name)
    constraint, draw, ids = grammars.compile(turn.params.response_format), random.Random(seed), []
    closing = ['"', "}", "]", tokenizer.eos_token, "</think>", "<|end|>", "<tool_call>"]
    closing = [tokenizer.convert_tokens_to_ids(token) for token in closing]
    while not constraint.is_over and len(ids) < longest:
        forced = constraint.forced()
        allowed = [] if forced else constraint.mask().nonzero()[0].tolist()
        token = forced[0] if forced else draw.choice([t for t in closing if t in allowed] * 2 or allowed)
        if not forced and draw.random() < 0.4:
            token = draw.choice(allowed)
        if token == tokenizer.eos_token_id:
            return decode(tokenizer, ids, turn), True
        ids.append(token)
        constraint.accept(token)
    return decode(tokenizer, ids, turn), constraint.is_over


def decode(tokenizer: Any, ids: list[int], turn: Turn) -> str:
    return tokenizer.decode(ids, skip_special_tokens=turn.params.skip_special_tokens)


def read_in_pieces(turn: Turn, text: str, seed: int) -> Reply:
    reader, draw, pieces = turn.reader(), random.Random(seed), []
    while text:
        size = draw.randint(1, 7)
        pieces += reader.push(text[:size])
        text = text[size:]
    pieces += reader.finish()
    return gather(pieces)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_what_must_be_a_call_is_one(name: str, seed: int) -> None:
    turns = make_turns(name)[0]
    turn = turns.make(USER, SamplingParams(), tools=[SEARCH, NOW], tool_choice="any")
    text, is_whole = say(name, turn, seed)
    if not is_whole:
        return
    reply = turn.read(text)
    assert [call.name for call in reply.calls] in (["search"], ["now"])
    assert not reply.text.strip()
    arguments = reply.calls[0].arguments
    assert arguments is not None
    if reply.calls[0].name == "now":
        assert arguments == {}
    else:
        assert isinstance(arguments["query"], str)
        assert set(arguments) <= {"query", "count", "tags"}
    again = read_in_pieces(turn, text, seed)
    assert again == reply


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_what_may_be_a_call_reads_the_same_in_pieces(name: str, seed: int) -> None:
    turn = make_turns(name)[0].make(USER, SamplingParams(), tools=[SEARCH, NOW])
    text, is_whole = say(name, turn, seed)
    reply = turn.read(text)
    assert read_in_pieces(turn, text, seed) == reply
    if is_whole:
        assert all(call.arguments is not None for call in reply.calls)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "no tools"])
def test_the_templates_own_calls_are_within_the_grammar_and_read_back(name: str) -> None:
    """What the family's template writes for a call is what the grammar takes and the reader finds."""
    turns, tokenizer, grammars = make_turns(name)
    call = {"function": {"name": "search", "arguments": {"query": 'a "b" }', "count": 3}}}
    if "KEY" in FAMILIES[name].calls:
        return
    said = turns._encoder.apply_chat_template(
        [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}], add_generation_prompt=False
    ).rpartition("<|assistant|>")[2]
    turn = turns.make(USER, SamplingParams(), tools=[SEARCH, NOW])
    if name == "deepseek-v3":
        said = "so\n</think>\n\n" + said
    constraint = grammars.compile(turn.params.response_format)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert constraint.admits(ids), tokenizer.convert_ids_to_tokens(ids)
    reply = turn.read(said)
    assert [(found.name, found.arguments) for found in reply.calls] == [("search", call["function"]["arguments"])]
    assert reply.thought == ("so" if name == "deepseek-v3" else "")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_none_means_no_call(name: str, seed: int) -> None:
    turn = make_turns(name)[0].make(USER, SamplingParams(), tools=[SEARCH], tool_choice="none")
    text, _ = say(name, turn, seed, 60)
    assert turn.read(text).calls == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_named_tool_is_the_one(name: str) -> None:
    turn = make_turns(name)[0].make(USER, SamplingParams(), tools=[SEARCH, NOW], tool_choice="now")
    text, is_whole = say(name, turn, 1)
    assert is_whole
    assert [(call.name, call.arguments) for call in turn.read(text).calls] == [("now", {})]


@pytest.mark.parametrize("name", FAMILIES)
def test_json_behind_thoughts(name: str) -> None:
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
    params = SamplingParams(response_format={"type": "json_schema", "schema": schema})
    for tools in (None, [NOW]):
        turn = make_turns(name)[0].make(USER, params, tools=tools)
        for seed in range(4):
            text, is_whole = say(name, turn, seed, 100)
            reply = turn.read(text)
            if is_whole and not reply.calls:
                assert set(json.loads(reply.text)) == {"year"}


def test_every_row_is_found_by_its_template() -> None:
    names = {row.name for row in FORMATS}
    assert {find_format(family.template).name for name, family in FAMILIES.items() if name != "no tools"} == names
    assert find_format("{{ messages }}") is None


def test_arguments_stream_and_their_call_is_named_first() -> None:
    turn = make_turns("hermes")[0].make(USER, SamplingParams(), tools=[SEARCH])
    reader = turn.reader()
    pieces = reader.push('Hm.\n<tool_call>\n{"name": "search", "arguments": {"que')
    assert pieces[0] == Text("Hm.\n")
    assert [(piece.name, piece.arguments) for piece in pieces[1:] if isinstance(piece, CallPart)] == [
        ("search", '{"que'),
    ]  # fmt: skip
    more = reader.push('ry": "x"}}\n</tool_call>')
    assert [piece.arguments for piece in more if isinstance(piece, CallPart)] == ['ry": "x"}']


def test_a_call_that_was_cut_off_has_no_arguments() -> None:
    turn = make_turns("hermes")[0].make(USER, SamplingParams(), tools=[SEARCH])
    (call,) = turn.read('<tool_call>\n{"name": "search", "arguments": {"query": "x').calls
    assert call.arguments is None
    assert call.text == '{"query": "x'


def test_the_same_prompt_gives_its_calls_the_same_ids() -> None:
    turns = make_turns("hermes")[0]
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    first, again, other = (
        turns.make(messages, SamplingParams(), tools=[NOW]).read(text).calls[0].id
        for messages in (USER, USER, [{"role": "user", "content": "?"}])
    )
    assert first == again != other
    assert len(first) == 9
    assert first.isalnum()


def test_ids_of_other_makers_become_ones_that_every_template_takes() -> None:
    call = {"id": "call_0123456789", "function": {"name": "now", "arguments": {}}}
    messages = plain_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_0123456789", "content": "noon"},
        ]
    )
    assert re.fullmatch("[a-z0-9]{9}", messages[0]["tool_calls"][0]["id"])
    assert messages[1]["tool_call_id"] == messages[0]["tool_calls"][0]["id"]
    assert (
        plain_messages([{"role": "tool", "tool_call_id": "abcDEF123", "content": ""}])[0]["tool_call_id"] == "abcDEF123"
    )


def test_several_calls_where_they_are_wanted() -> None:
    turns = make_turns("hermes")[0]
    for options, several in (
        ({}, True),
        ({"parallel_tool_calls": False}, False),
        ({"tool_choice": "any"}, False),
        ({"tool_choice": "any", "parallel_tool_calls": True}, True),
    ):
        turn = turns.make(USER, SamplingParams(), tools=[NOW], **options)
        assert ("call)*" in turn.params.response_format["grammar"]) == several


def test_a_template_without_tools_is_told_in_words() -> None:
    turns = make_turns("no tools")[0]
    assert not turns.knows_tools
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    prompt = turns.make(messages, SamplingParams(), tools=[NOW]).prompt
    assert prompt.index('"name": "now", "description": "The time."') < prompt.index("Where is Brenvik?")
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' in prompt
    assert "<tool_response>\nnoon\n</tool_response>" in prompt


def test_neighbours_of_one_role_are_one_message() -> None:
    turns = make_turns("no tools")[0]
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *USER, *USER]
    assert turns.make(messages, SamplingParams()).prompt == (
        "<s><|system|>a\nb<|user|>Where is Brenvik?\nWhere is Brenvik?<|assistant|>"
    )


def test_without_tools_nothing_is_in_the_way() -> None:
    for name in ("hermes", "no tools", "llama"):
        turn = make_turns(name)[0].make(USER, SamplingParams(max_tokens=3))
        assert turn.params == SamplingParams(max_tokens=3)
        assert turn.read('{"a": 1} <b>').text == '{"a": 1} <b>'


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tools": [NOW], "tool_choice": "then"}, ToolError, r"'then'.*there: now"),
        ({"tool_choice": "any"}, ToolError, "no tools"),
        ({"tools": [NOW, NOW]}, ToolError, "two tools are called 'now'"),
        ({"tools": [{"name": "a b"}]}, ToolError, "letters, digits"),
        ({"tools": [{"name": "f", "parameters": {"type": "string"}}]}, ToolError, "'f'.*schema of an object"),
        ({"messages": []}, PromptError, "list of messages"),
        ({"messages": [{"content": "x"}]}, PromptError, "'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, PromptError, "text only.*image_url"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, PromptError, "a tool call is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_turns("hermes")[0].make(changes.pop("messages", USER), SamplingParams(), **changes)


def test_tools_beside_another_format_are_refused() -> None:
    with pytest.raises(ToolError, match="'regex'"):
        make_turns("hermes")[0].make(USER, SamplingParams(response_format={"type": "regex", "regex": "a"}), tools=[NOW])


def test_a_family_that_only_its_tokenizer_can_read() -> None:
    """A form that is not in the table, with transformers' own description of it."""
    tokenizer = make_tokenizer()
    loop = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    tokenizer.chat_template = loop + "{{ tools | tojson }}<|assistant|>"
    tokenizer.response_template = {
        "start_anchor": "<|assistant|>",
        "fields": {
            "content": {},
            "tool_calls": {
                "open": "@@",
                "close": "@@",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": {"name": "{content.f}", "arguments": "{content.a}"}},
            },
        },
    }
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    turns = TurnMaker(PromptEncoder(tokenizer, max_context=None), tokenizer, grammars.special_tokens)
    assert turns.knows_tools
    turn = turns.make(USER, SamplingParams(), tools=[NOW])
    assert '"name": "now"' in turn.prompt
    reply = turn.read('Let me see. @@{"f": "now", "a": {"x": 1}}@@')
    assert [(call.name, call.arguments) for call in reply.calls] == [("now", {"x": 1})]
    assert turn.read('@@{"f": "now", "a"').calls == (), "cut off"
    forced = turns.make(USER, SamplingParams(), tools=[NOW], tool_choice="any")
    assert "<tool_call>" in forced.prompt, "no grammar of that form is known, so it is asked for in ours"
    assert forced.params.response_format["type"] == "grammar"


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
AS_JSON = SamplingParams(response_format={"type": "json_schema", "schema": CITY})
CALLED = [
    *USER,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": {}}}]},
    {"role": "tool", "tool_call_id": "1", "content": "noon"},
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "params", "options"),
    [
        (CALLED, AS_JSON, {}),
        (CALLED, SamplingParams(), {}),
        (USER, AS_JSON, {"tools": [NOW]}),
        (CALLED, AS_JSON, {"tools": [NOW]}),
        (CALLED, AS_JSON, {"tools": [NOW], "tool_choice": "none"}),
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        '{"city": "Rome"}',
        '{"name": "Rome"}',
        '{"name": "Rome", "year": 1}',
        '{"name": 3}',
        '{"',
        "{",
        "{}",
        '{"a": {"b": 1}}',
    ],
)
def test_what_is_no_call_is_text(
    name: str, messages: list[Any], params: SamplingParams, options: dict[str, Any], answer: str
) -> None:
    turn = make_turns(name)[0].make(messages, params, **options)
    said = turn_opening(name) + answer
    for reply in (turn.read(said), *(read_in_pieces(turn, said, seed) for seed in range(3))):
        assert (reply.text.lstrip("\n"), reply.calls) == (answer, ())


def turn_opening(name: str) -> str:
    """What comes before an answer."""
    return {"harmony": "<|channel|>final<|message|>", "deepseek-v3": "so</think>"}.get(name, "")


@pytest.mark.parametrize("tools", [[NOW], []])
def test_a_call_of_what_cannot_be_called_is_text(tools: list[Any]) -> None:
    answer = '{"name": "then", "parameters": {"a": 1}}'
    turn = make_turns("llama")[0].make(CALLED, AS_JSON, tools=tools)
    for reply in (turn.read(answer), read_in_pieces(turn, answer, 1)):
        assert (reply.text, reply.calls) == (answer, ())


def test_text_that_could_have_been_a_call_streams_once_it_cannot() -> None:
    reader = make_turns("llama")[0].make(CALLED, SamplingParams()).reader()
    assert reader.push('{"name": "Ro') == []
    assert reader.push('me", "year"') == [Text('{"name": "Rome", "year"')]
    assert reader.push(": 1}") == [Text(": 1}")]
    assert reader.finish() == []


def test_a_mark_without_a_call_is_text() -> None:
    turn = make_turns("hermes")[0].make(CALLED, SamplingParams())
    said = "Write <tool_call> before a call."
    for reply in (turn.read(said), read_in_pieces(turn, said, 1)):
        assert (reply.text, reply.calls) == (said, ())


def test_a_declared_form_that_is_no_call_is_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools | tojson }}<|assistant|>"
    call = {"open": "@@", "close": "@@", "content": "json", "repeats": True}
    tokenizer.response_template = {"start_anchor": "<|assistant|>", "fields": {"content": {}, "tool_calls": call}}
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    turns = TurnMaker(PromptEncoder(tokenizer, max_context=None), tokenizer, grammars.special_tokens)
    turn = turns.make(USER, SamplingParams(), tools=[NOW])
    assert turn.read('@@{"city": "Rome"}@@').text == '{"city": "Rome"}'
    assert turn.read('@@{"city": "Ro').text == '{"city": "Ro'
