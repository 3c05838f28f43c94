"""From texts that stand in a prompt to passages, and to the sequences that compute them in contexts of their own.

Made on the caller's thread, as the rest of a request is. What is cached by then is looked at and may be gone when the
request is admitted; whoever admits it looks again (:mod:`layerstream.scheduling.blending`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from layerstream.api.params import SamplingParams
from layerstream.core.passages import Passage
from layerstream.core.sequence import Sequence
from layerstream.kv.keys import page_keys
from layerstream.kv.pages import PagePool
from layerstream.text.passages import EDGE, LEAST_TOKENS, Heads, find_passages


class Contexts:
    """Finds passages in prompts of one model. Any thread may call.

    Args:
        count_cached: how many of some pages, from the first on, need not be computed.
        how: which of their tokens are computed again.
    """

    def __init__(self, tokenizer: Any, pool: PagePool, count_cached: Callable[[Seq[bytes]], int], how: str) -> None:
        self._tokenizer = tokenizer
        self._pool = pool
        self._count_cached = count_cached
        self._how = how
        self._heads = Heads()

    def find(
        self, token_ids: Seq[int], texts: Iterable[str], tenant: str = ""
    ) -> tuple[tuple[Passage, ...], list[list[int]]]:
        """The passages of a prompt of *tenant*, of which *texts* stand in it; and the tokens of the context of each.

        A passage that stands where it was computed before, in pages of this very beginning, is none: it is exact. So
        are those that there is no memory for beside the prompt.
        """
        pool = self._pool
        size, room = pool.page_tokens, pool.num_pages - pool.pages_for(len(token_ids)) - 1
        places = find_passages(token_ids, texts, self._encode)
        if not places:
            return (), []
        head = self._heads.head_of(token_ids, max(0, places[0][0] - EDGE), tenant)
        num_exact = size * self._count_cached(page_keys(token_ids, size, tenant))
        passages: list[Passage] = []
        contexts: list[list[int]] = []
        for start, stop in places:
            context = [*head, *token_ids[start:stop]]
            context += [context[-1]] * (-len(context) % size + 1)  # up to the end of a page, and one that is not kept
            keys = page_keys(context, size, tenant)
            movable = stop - start
            exact = max(0, num_exact - start)  # of the passage: there as they stand
            if movable - exact < LEAST_TOKENS:
                continue
            if len(keys) > room:
                break
            room -= len(keys)
            passages.append(Passage(start + exact, start + movable, len(head) + exact, tuple(keys), self._how))
            contexts.append(context)  # also of one that is there: by the time of its admission it may not be
        return tuple(passages), contexts

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def context_sequence(number: int, token_ids: list[int], passage: Passage, terms: Mapping[str, Any]) -> Sequence:
    """The sequence that computes *passage* in a context of its own, *token_ids*.

    Args:
        terms: priority, client and tenant of the prompt that the passage stands in.
    """
    params = SamplingParams(max_tokens=1, temperature=0.0)  # none is drawn
    keys = list(passage.keys)
    return Sequence(number, token_ids, len(token_ids), params, prefix_keys=keys, is_passage=True, **terms)
