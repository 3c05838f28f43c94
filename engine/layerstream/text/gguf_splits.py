"""How text is split before byte-level merges, by the name that a GGUF file has for it.

transformers knows some of the names and splits as GPT-2 does for all others, which gives other tokens. What it leaves
out is here, after llama.cpp's ``llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT_BY_DIGIT = (r"\p{N}", _GPT2)
_THREE_DIGITS = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_ONE_DIGIT = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
_SEED = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SPLITS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "a.x-4.0", "mellum", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "mellum2"), _DIGIT_BY_DIGIT),
    **dict.fromkeys(("chatglm-bpe", "glm4", "glm5"), _THREE_DIGITS),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), _ONE_DIGIT),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "seed-coder": _SEED,
}
_AS_TRANSFORMERS = frozenset({None, "default", *GGUF_PRE_TOKENIZER_SPLITS})


def is_known(name: str | None) -> bool:
    """Whether it is known how a vocabulary of that name splits text."""
    return name in _SPLITS or name in _AS_TRANSFORMERS


def split_as(name: str | None, backend: Any) -> None:
    """Let *backend*, a byte-level tokenizer, split text as *name* says."""
    if name in _SPLITS:
        splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[name]]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
