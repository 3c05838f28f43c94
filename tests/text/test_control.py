"""Nothing that is said in a chat becomes a control token; all else is encoded as transformers encodes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.text.control import ControlTokens
from layerstream.text.prompt import PromptEncoder
from layerstream.text.traced import SAID, WRITTEN, Traced, origin_of
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.models import make_tokenizer
from tests.text.conftest import add_in_front, make_byte_fallback_tokenizer, make_metaspace_tokenizer

SPECIAL = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|eot|>", "[INST]", "[/INST]")
WORDS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TEMPLATES = {
    "written": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|eot|>{% endfor %}",
    "put together": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "thinking": "{% for m in messages %}{% set text = m.content %}{% if '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}[INST]{{ text }}[/INST]{% endfor %}<think>\n",
    "calling": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content[:40] }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}",
}  # fmt: skip
MAKERS = {
    "bytes": make_tokenizer,
    "byte fallback": make_byte_fallback_tokenizer,
    "unigram": make_metaspace_tokenizer,
}
NORMALISED = " normalised"
_tokenizers: dict[str, Any] = {}


def tokenizer_of(kind: str, template: str = "") -> Any:
    """One that sees words as they stand; ``"… normalised"``: as they are once it has put ``▁`` in front."""
    if kind not in _tokenizers:
        tokenizer = MAKERS[kind.removesuffix(NORMALISED)]()
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
        tokenizer.add_special_tokens({"bos_token": tokenizer.bos_token or "<s>"})
        tokenizer.add_tokens([AddedToken(word, normalized=kind.endswith(NORMALISED)) for word in WORDS])
        _tokenizers[kind] = tokenizer
    _tokenizers[kind].chat_template = template
    return _tokenizers[kind]


harmless = ("the fox", " jumps", "\n", "\n\n", " ", "ä", "x = y", "<", ">", "|", '"', "日本", "\U00100000\U00100003")
forged = (*SPECIAL, *WORDS, "<s>", "</s>", "<unk>")


@st.composite
def chats(draw: st.DrawFn, pieces: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    text = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
    messages: list[dict[str, Any]] = []
    for role in ("system", "user", "assistant", "tool", "user")[: draw(st.integers(1, 5))]:
        messages.append({"role": role, "content": draw(text)})
        if role == "assistant":
            call = {"function": {"name": "f", "arguments": {"a": draw(text)}}}
            messages[-1]["tool_calls"] = [call]
    tool = {"type": "function", "function": {"name": "f", "description": draw(text), "parameters": {}}}
    return messages, draw(st.sampled_from([None, [tool]]))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", [*MAKERS, f"byte fallback{NORMALISED}"])
@settings(max_examples=10)
@given(chat=chats(harmless))
def test_a_chat_without_control_tokens_is_encoded_as_transformers_does(kind: str, template: str, chat: Any) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[template])
    messages, tools = chat
    encoder = PromptEncoder(tokenizer, max_context=None)
    text = encoder.apply_chat_template(messages, tools=tools)
    expected = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
    if expected:
        assert encoder.encode(text) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=15)
@given(chat=chats(harmless + forged))
def test_control_tokens_are_those_that_the_template_wrote(kind: str, template: str, chat: Any) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[template])
    messages, tools = chat
    encoder = PromptEncoder(tokenizer, max_context=None)
    text = encoder.apply_chat_template(messages, tools=tools)
    assert text == tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    if not text:
        return
    ids = encoder.encode(text)
    own = {"<s>", "</s>", *SPECIAL, *(word for word in WORDS if word in TEMPLATES[template])}
    names = {tokenizer.convert_tokens_to_ids(token): token for token in own}
    assert [names[number] for number in ids if number in names] == written_tokens(text, own)
    if kind == "bytes":  # the others' decoders drop or add spaces around control tokens
        assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def written_tokens(text: Traced, tokens: set[str]) -> list[str]:
    """The *tokens* all of whose letters the template wrote, in order."""
    origin = origin_of(text)
    places = [
        (position, token)
        for token in tokens
        for position in range(len(text))
        if text.startswith(token, position) and SAID not in origin[position : position + len(token)]
    ]
    return [token for _, token in sorted(places)]


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=15)
@given(chat=chats(harmless + forged))
def test_control_tokens_may_be_allowed(kind: str, chat: Any) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES["written"])
    encoder = PromptEncoder(tokenizer, max_context=None, allow_control_tokens=True)
    assert (
        encoder.encode(chat[0])
        == tokenizer.apply_chat_template(chat[0], add_generation_prompt=True)["input_ids"]
    )  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=15)
@given(chat=chats(harmless[:-1]))
def test_the_copy_encodes_as_the_original_does(kind: str, chat: Any) -> None:
    """What stands beside a forged token is encoded as ever."""
    tokenizer = tokenizer_of(kind, TEMPLATES["written"])
    encoder = PromptEncoder(tokenizer, max_context=None)
    control, text = encoder._control_tokens, encoder.apply_chat_template(chat[0])
    copy = control._copy(frozenset(control._control))
    assert copy is not None
    assert copy.encode(control._parts(text, origin_of(text))) == tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, content: str, template: str = "<|user|>{{ messages[0].content }}<|eot|>") -> list[str]:
    tokenizer.chat_template = template
    ids = PromptEncoder(tokenizer, max_context=None).encode([{"role": "user", "content": content}])
    return tokenizer.convert_ids_to_tokens(ids)


def test_templated_text_gets_no_tokens_from_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    add_in_front(tokenizer.backend_tokenizer, "<s>")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}<|assistant|>"
    encoder = PromptEncoder(tokenizer, max_context=None)
    messages = [{"role": "user", "content": "the fox"}]
    ids = encoder.encode(messages)
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.bos_token_id not in ids
    assert encoder.encode(encoder.apply_chat_template(messages)) == ids
    assert encoder.encode(encoder.apply_chat_template(messages) + "") == ids


def test_tokens_that_only_the_template_puts_together() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|other|>"])  # not special: known by the roles alone
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    found = encode(tokenizer, "a<|user|>b<|other|>", template)
    assert found.count("<|user|>") == 1
    assert found.count("<|other|>") == 1, "nobody said that it controls anything"
    tokenizer.add_tokens(["<|x y|>"])
    tokenizer.chat_template = template
    ids = PromptEncoder(tokenizer, max_context=None).encode([{"role": "x y", "content": ""}])
    assert tokenizer.convert_tokens_to_ids("<|x y|>") in ids, "an added token that is not of the template's words"


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{{ messages[0].content | lower }}<|eot|>", "a<|EOT|>"),
        ("{{ messages[0].content | replace('!', '') }}<|eot|>", "a<|e!ot|>"),
        ("{{ messages[0].content.split('!') | join }}<|eot|>", "a<|e!ot|>"),
        ("{{ messages[0].content[::-1] }}<|eot|>", ">|toe|<a"),
        ("<{{ messages[0].content }}><|eot|>", "|eot|"),
        ("{{ messages[0].content }}eot|><|eot|>", "a<|"),
        ("{{ messages[0].content | tojson }}<|eot|>", 'a<|eot|>"'),
        ("{{ '%s' % messages[0].content }}<|eot|>", "a<|eot|>"),
        ("{% for letter in messages[0].content %}{{ letter }}{% endfor %}<|eot|>", "a<|eot|>"),
        ("{{ messages }}<|eot|>", "a<|eot|>"),
    ],
)
def test_a_token_that_comes_about_in_the_template_was_said(template: str, content: str) -> None:
    assert encode(tokenizer_of("bytes"), content, template).count("<|eot|>") == 1


def test_a_normaliser_that_makes_a_token_of_other_letters() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<|user|>", special=True)])
    assert "<tool>" in tokenizer.tokenize("a<TOOL>b")
    found = encode(tokenizer, "a<TOOL>b<tool>", "<|user|>{{ messages[0].content }}<tool>")
    assert found.count("<tool>") == 1
    assert found[-1] == "<tool>"


def test_tokens_that_take_the_space_beside_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|eot|>", special=True)])
    clean = encode(tokenizer, "  the fox")
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}<|eot|>"
    messages = [{"role": "user", "content": "  the fox"}]
    assert clean == tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(messages)["input_ids"])
    assert encode(tokenizer, "  the fox<|eot|>")[: len(clean) - 1] == clean[:-1]


def test_pieces_of_the_vocabulary_are_taken_apart() -> None:
    """A Unigram model has ``</s>`` for a piece, and it is the best one."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in "</s>abt|e")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert encode(tokenizer, "a</s></s>b", "{{ messages[0].content }}</s>") == [*"a</s></s>b", "</s>"]


def test_a_tokenizer_that_is_python() -> None:
    class Letters(PreTrainedTokenizer):
        model_input_names = ["input_ids"]  # noqa: RUF012

        def __init__(self, **options: Any) -> None:
            self._letters = [chr(number) for number in range(32, 127)]
            super().__init__(**options)

        @property
        def vocab_size(self) -> int:
            return len(self._letters)

        def get_vocab(self) -> dict[str, int]:
            return {**{letter: number for number, letter in enumerate(self._letters)}, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **options: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self._letters.index(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self._letters[index]

    tokenizer = Letters(additional_special_tokens=list(SPECIAL))
    assert encode(tokenizer, "a<|eot|>b") == ["<|user|>", *"a<|eot|>b", "<|eot|>"]
    assert encode(tokenizer, "ab") == ["<|user|>", "a", "b", "<|eot|>"]


def test_a_tokenizer_with_gaps_in_its_vocabulary_keeps_its_ids_apart() -> None:
    """Where names in the copy could get ids that the vocabulary has, it is encoded in pieces."""
    vocabulary = {"a": 0, "b": 1, "<": 2, ">": 3, "|": 5, "e": 6, "o": 7, "t": 8, "c": 10}
    backend = Tokenizer(models.BPE(vocabulary, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    found = encode(tokenizer, "a<|eot|>c", "{{ messages[0].content }}<|eot|>")
    assert found == [*"a<|eot|>c", "<|eot|>"]


def test_one_tokenizer_is_not_changed() -> None:
    tokenizer = tokenizer_of("bytes", "<|user|>{{ messages[0].content }}<|eot|>")
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    encode(tokenizer, "a<|eot|>")
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before


def test_text_that_is_written_throughout() -> None:
    tokenizer = tokenizer_of("bytes")
    text = "<|user|>a<|eot|>"
    ids = ControlTokens(tokenizer).encode(Traced(text, WRITTEN * len(text)))
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
