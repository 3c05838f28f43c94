"""What warming would take, and what it would bring: bytes, seconds, the share of later prompts that is reused.

Of many documents :data:`SAMPLE` are encoded, evenly spaced in their order of popularity; the size of the others is
estimated by their characters, and so is how much of them is stored already. ``encoded`` says how many it were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.core.sizes import format_size
from layerstream.errors import StorageFull
from layerstream.scheduling.states import snapshot_stride
from layerstream.store.choice import recompute_seconds
from layerstream.store.store import PrefixStore
from layerstream.warming.choice import STORE_SHARE, Allowance, Corpus, Sizes
from layerstream.warming.prefixes import Engine, Prefix, Prefixes

SAMPLE = 256
DOCUMENTS_PER_PROMPT = 4


@dataclass(frozen=True, slots=True)
class WarmForecast:
    """What warming documents would take and bring.

    Attributes:
        documents: how many there are, each text once.
        prefix_tokens: of the prefixes of those that are warmed, in whole pages; what documents share counts once.
        missing_tokens: those that are not stored yet.
        missing_bytes: what they will take on disk; ``stored_bytes`` are there already, ``max_bytes`` is the bound.
        seconds: what computing them takes, by what was measured so far; ``None`` before anything was. In the background
            the time that questions take comes on top.
        chosen: documents that are warmed, the most popular first; ``left_out`` are those that ``top``, the budget or
            the store has no room for, or that the context does not hold.
        encoded: documents that were encoded; the size of the others is estimated by their characters.
        coverage: the share of the retrievals so far that were of documents that are warmed: the sum of their popularity
            by the sum over all documents given. ``None``: nothing was retrieved yet, and not all of them are warmed.
        reused_share: which share of later prompts' tokens will be reused, on average::

                coverage * prefix / (prefix + (documents_per_prompt - 1) * document)

            *prefix* is the mean length of a warmed prefix (the prompt's head and one document), *document* that of the
            document in it, each in tokens. It assumes that what is asked is spread as it was, that a warmed document is
            as often the first of a prompt as others are, that every prompt has *documents_per_prompt* of average
            length, and that the question is short. An order that puts a warmed one first makes it more; a prompt that
            shares more than its first document, as well.
    """

    documents: int
    prefix_tokens: int
    missing_tokens: int
    missing_bytes: int
    stored_bytes: int
    max_bytes: int
    seconds: float | None
    chosen: int
    left_out: int
    encoded: int
    coverage: float | None
    reused_share: float | None

    @property
    def fits(self) -> bool:
        """Whether all documents are warmed."""
        return not self.left_out


@dataclass(slots=True)
class _Tally:
    """What the documents chosen so far come to."""

    chosen: list[str]
    pages: float = 0.0
    missing_pages: float = 0.0
    missing_bytes: float = 0.0
    pages_each: float = 0.0  # of every prefix, what they share included
    smallest_miss: float = float("inf")  # bytes of what there was no room for


def sizes_of(engine: Engine, store: PrefixStore) -> Sizes:
    """What pages take in *store*."""
    facts, page_tokens = engine.plan.facts, engine.plan.page_tokens
    stride = snapshot_stride(facts.state_bytes, facts.kv_token_bytes, page_tokens)
    return Sizes(store.page_bytes(facts.kv_token_bytes), store.snapshot_bytes, stride)


def room_for(store: PrefixStore, budget_bytes: int | None) -> float:
    """Bytes that warmed documents may take in *store*."""
    room = STORE_SHARE * store.room()[1]
    return room if budget_bytes is None else min(room, budget_bytes)


def nothing_fits(smallest: float, room: float) -> StorageFull:
    """There is not even room for one document."""
    return StorageFull(
        f"the KV of one of these documents takes {format_size(int(smallest))}, and there is room for "
        f"{format_size(int(room))}: raise the budget, or pass KVStoreConfig(max_bytes=...) with more, compression, or "
        "shorter documents"
    )


def make_forecast(
    engine: Engine,
    prefixes: Prefixes,
    store: PrefixStore,
    corpus: Corpus,
    documents_per_prompt: int = DOCUMENTS_PER_PROMPT,
) -> WarmForecast:
    """What warming *corpus* takes and brings.

    Raises:
        ConfigurationError: none has a prefix of a whole page. PromptTooLong: the context holds none of them.
        StorageFull: there is not even room for one.
    """
    order = corpus.order
    sample = order if len(order) <= SAMPLE else [order[at * len(order) // SAMPLE] for at in range(SAMPLE)]
    prefixes.check(sample)
    measured = {text: prefixes.of(text) for text in sample}
    room = room_for(store, corpus.budget_bytes)
    tally = _choose(order, measured, prefixes, store, sizes_of(engine, store), room)
    if not tally.pages and tally.smallest_miss < float("inf"):
        raise nothing_fits(tally.smallest_miss, room)
    coverage = corpus.coverage(tally.chosen)
    rates, per_token = store.rates(), engine.compute_seconds_per_token
    missing = round(tally.missing_pages * prefixes.page_tokens)
    stored, bound = store.room()
    return WarmForecast(
        documents=len(corpus.texts),
        prefix_tokens=round(tally.pages * prefixes.page_tokens),
        missing_tokens=missing,
        missing_bytes=round(tally.missing_bytes),
        stored_bytes=stored,
        max_bytes=bound,
        seconds=None
        if per_token is None
        else rates.weight_seconds + recompute_seconds(missing, missing * per_token, rates),
        chosen=len(tally.chosen),
        left_out=len(corpus.texts) - len(tally.chosen),
        encoded=len(sample),
        coverage=coverage,
        reused_share=None if coverage is None else coverage * _first_share(tally, documents_per_prompt),
    )


def _choose(
    order: Sequence[str],
    measured: dict[str, Prefix | None],
    prefixes: Prefixes,
    store: PrefixStore,
    sizes: Sizes,
    room: float,
) -> _Tally:
    """Go through *order* as a run will, with estimates for what was not *measured*."""
    estimate = _Estimate(measured, store)
    tally, allowance, seen = _Tally([]), Allowance(room), set[bytes]()
    for text in order:
        if allowance.spent:
            break
        if text in measured:
            prefix = measured[text]
            if prefix is None:
                if text not in prefixes.too_long:
                    tally.chosen.append(text)  # shorter than a page: nothing to do
                continue
            fresh = [key for key in prefix.keys if key not in seen]
            num_stored = store.look_up(prefix.keys)
            missing = sum(key not in seen for key in prefix.keys[num_stored:])
            pages, whole = float(len(fresh)), float(len(prefix.keys))
        else:
            fresh = []
            pages = estimate.own_pages(text)
            missing, whole = pages * estimate.missing_share, pages + estimate.shared_pages
        if allowance.admit(sizes.of(pages)):
            seen.update(fresh)
            tally.chosen.append(text)
            tally.pages += pages
            tally.pages_each += whole
            tally.missing_pages += missing
            tally.missing_bytes += sizes.of(missing)
        else:
            tally.smallest_miss = min(tally.smallest_miss, sizes.of(pages))
    return tally


class _Estimate:
    """Pages of documents that were not encoded, from those that were."""

    def __init__(self, measured: dict[str, Prefix | None], store: PrefixStore) -> None:
        found = [(text, prefix) for text, prefix in measured.items() if prefix is not None]
        counts = Counter(key for _, prefix in found for key in prefix.keys)
        num_own = sum(counts[key] == 1 for _, prefix in found for key in prefix.keys)
        num_missing = (
            sum(counts[key] == 1 for _, prefix in found for key in prefix.keys[store.look_up(prefix.keys) :])
            if found
            else 0
        )
        self._own_pages_per_character = num_own / max(1, sum(len(text) for text in measured))
        self.shared_pages = (counts.total() - num_own) / max(1, len(found))
        self.missing_share = num_missing / max(1, num_own)

    def own_pages(self, text: str) -> float:
        """Pages that only *text* has."""
        return len(text) * self._own_pages_per_character


def _first_share(tally: _Tally, documents_per_prompt: int) -> float:
    """Which share of a prompt the head and its first document are."""
    if not tally.pages_each:
        return 0.0
    num = len(tally.chosen)
    prefix, document = tally.pages_each / num, tally.pages / num
    return prefix / (prefix + (documents_per_prompt - 1) * document)
