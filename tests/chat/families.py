"""Chat templates with the marks of each family, and tokenizers that have those marks as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from layerstream.chat.turn import TurnMaker
from layerstream.text.prompt import PromptEncoder
from layerstream.text.response_format import Grammars

from tests.models import make_tokenizer

_LOOP = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' + "
    "m['content'] }}{% for call in m['tool_calls'] %}CALL{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """*calls*: how the template writes a call; *tokens* are special ones, *words* are tokens that show."""

    calls: str
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    ending: str = ""

    @property
    def template(self) -> str:
        return _LOOP.replace("CALL", self.calls) + self.ending


_OBJECT = "{{ '{\"name\": \"' + call.function.name + '\", \"KEY\": ' }}{{ call.function.arguments | tojson }}{{ '}' }}"
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_THINKS = "{# <think> </think> #}"

FAMILIES = {
    "hermes": Family(
        "{{ '<tool_call>\\n' }}" + _OBJECT.replace("KEY", "arguments") + "{{ '\\n</tool_call>' }}",
        words=("<tool_call>", "</tool_call>"),
    ),
    "hermes in letters": Family("{{ '<tool_call>\\n' }}" + _OBJECT + "{{ '\\n</tool_call>' }}"),
    "qwen 3": Family(
        "{{ '<tool_call>\\n' }}" + _OBJECT.replace("KEY", "arguments") + "{{ '\\n</tool_call>' }}",
        words=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        ending=_THINKS,
    ),
    "llama": Family(
        _OBJECT.replace("KEY", "parameters") + "{# <|start_header_id|> #}", ("<|start_header_id|>", "<|python_tag|>")
    ),
    "mistral": Family("{{ '[TOOL_CALLS] [' }}" + _OBJECT.replace("KEY", "arguments") + "{{ ']' }}", ("[TOOL_CALLS]",)),
    "mistral-tekken": Family(
        "{{ '[TOOL_CALLS][' }}" + _OBJECT.replace("KEY", "arguments") + "{{ ']' }}", ("[TOOL_CALLS]",)
    ),
    "mistral-v11": Family(
        "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}{{ call.function.arguments | tojson }}",
        ("[TOOL_CALLS]", "[ARGS]"),
    ),
    "deepseek-v3": Family(
        "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name }}"
        "{{ '\\n```json\\n' }}"
        "{{ call.function.arguments | tojson }}{{ '\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}",
        words=(*_DEEPSEEK, "<think>", "</think>"),
        ending="{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}",
    ),
    "deepseek-v3.1": Family(
        "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}"
        "{{ call.function.arguments | tojson }}{{ '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}",
        words=_DEEPSEEK,
    ),
    "harmony": Family(
        "{{ '<|channel|>commentary to=functions.' + call.function.name + ' <|constrain|>json<|message|>' }}"
        "{{ call.function.arguments | tojson }}{# <|channel|>analysis<|message|> #}",
        ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>"),
    ),
    "no tools": Family(""),
}
"""By name; ``"no tools"`` knows none and is told about them in words."""


@cache
def make_turns(name: str) -> tuple[TurnMaker, Any, Grammars]:
    """A turn maker, the tokenizer and the grammars of a family."""
    family, tokenizer = FAMILIES[name], make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.add_tokens(list(family.words))
    tokenizer.chat_template = (
        family.template
        if name != "no tools"
        else _LOOP.split("{% for call")[0].replace("{% if tools %}{{ tools | tojson }}{% endif %}", "")
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return (
        TurnMaker(PromptEncoder(tokenizer, max_context=None), tokenizer, grammars.special_tokens),
        tokenizer,
        grammars,
    )
