"""What was answered after a prefix, remembered so that a repeated or similar question can be guessed from it.

An answer hangs on a stored page and goes with it: evicting, clearing or dropping the page forgets its answers (a
foreign key sees to that). Answers of prompts shorter than a page hang on their namespace alone. The namespace keeps
models, and engines with salts of their own, apart, as for pages; within it pages keep a call's tenants apart, so an
answer that is a tenant's hangs on a page or is not kept. Every answer carries its namespace's name besides, which is
checked when it is asked for. Nothing here can change what is answered: it is only ever a guess to verify.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.store.index import Index
from layerstream.store.segment import Key

NEAR_TOKENS = 128  # of the prompt are kept with an answer at the least: what the question looks like
FAR_TOKENS = 512  # before the end of a prompt, where answers to other questions may hang
MOST_RECALLED = 48  # answers, the most recent ones
MOST_PER_PREFIX = 256
MOST_ANSWERS = 20_000  # in one folder


@dataclass(frozen=True, slots=True)
class RememberedAnswer:
    """An answer and what it followed.

    Attributes:
        prefix: the page that it hangs on; empty: none.
        question: the rest of the prompt, behind that page.
        answer: the generated tokens.
    """

    prefix: Key
    question: tuple[int, ...]
    answer: tuple[int, ...]


def note(
    keys: Sequence[Key], page_tokens: int, prompt: Sequence[int], answer: Sequence[int], *, is_tenants: bool = False
) -> RememberedAnswer | None:
    """What to remember of *answer* to *prompt*, whose whole pages are *keys*; ``None``: nothing.

    Args:
        is_tenants: it is a tenant's: only a page of theirs keeps it from others.
    """
    if is_tenants and not keys:
        return None
    num_pages = max(int(is_tenants), min(len(keys), (len(prompt) - NEAR_TOKENS) // page_tokens))
    prefix = keys[num_pages - 1] if num_pages else b""
    return RememberedAnswer(prefix, tuple(prompt[num_pages * page_tokens :]), tuple(answer))


def places(keys: Sequence[Key], page_tokens: int, num_prompt_tokens: int, *, is_tenants: bool = False) -> list[Key]:
    """The pages that answers to similar questions may hang on, the last one first."""
    first = max(0, (num_prompt_tokens - FAR_TOKENS) // page_tokens)
    found = list(reversed(keys[first:]))
    return found if first or is_tenants else [*found, b""]


class Answers:
    """The answers in an index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def remember(self, namespace: int, tenant: str, item: RememberedAnswer) -> bool:
        """Keep *item* of the namespace with that number and name; whether that was done: its page has to be here.

        The oldest go when there are too many.
        """
        if item.prefix and not self._index.find(namespace, [item.prefix]):
            return False
        prefix = item.prefix or None
        with self._index.transaction() as connection:
            connection.execute(
                "DELETE FROM answers WHERE namespace = ? AND prefix IS ? AND question = ?",
                (namespace, prefix, _packed(item.question)),
            )
            connection.execute(
                "INSERT INTO answers (namespace, tenant, prefix, question, answer, last_used) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (namespace, tenant, prefix, _packed(item.question), _packed(item.answer), time.time()),
            )
            connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM answers WHERE namespace = ? AND prefix IS ? "
                "ORDER BY last_used DESC, id DESC LIMIT -1 OFFSET ?)",
                (namespace, prefix, MOST_PER_PREFIX),
            )
            connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM answers ORDER BY last_used DESC, id DESC "
                "LIMIT -1 OFFSET ?)",
                (MOST_ANSWERS,),
            )
        return True

    def recall(self, namespace: int, tenant: str, prefixes: Sequence[Key]) -> list[list[int]]:
        """Questions with their answers that hang on *prefixes*, the most recent first."""
        marks = ",".join("?" * len(prefixes))
        without = " OR prefix IS NULL" if b"" in prefixes else ""
        rows = self._index.connection().execute(
            f"SELECT question, answer FROM answers WHERE namespace = ? AND tenant = ? "
            f"AND (prefix IN ({marks}){without}) ORDER BY last_used DESC, id DESC LIMIT ?",
            (namespace, tenant, *prefixes, MOST_RECALLED),
        )
        return [[*_unpacked(question), *_unpacked(answer)] for question, answer in rows]

    def all(self, namespace: str) -> list[RememberedAnswer]:
        """What is remembered in *namespace*, the oldest first."""
        rows = self._index.connection().execute(
            "SELECT a.prefix, a.question, a.answer FROM answers a JOIN namespaces n ON n.id = a.namespace "
            "WHERE n.name = ? ORDER BY a.last_used, a.id",
            (namespace,),
        )
        return [RememberedAnswer(prefix or b"", (*_unpacked(q),), (*_unpacked(a),)) for prefix, q, a in rows]

    def forget(self, namespace: str) -> None:
        """Nothing was answered in *namespace*."""
        with self._index.transaction() as connection:
            connection.execute(
                "DELETE FROM answers WHERE namespace = (SELECT id FROM namespaces WHERE name = ?)", (namespace,)
            )

    def count(self, namespace: str) -> int:
        """How many are remembered in *namespace*."""
        row = self._index.connection().execute(
            "SELECT count(*) FROM answers a JOIN namespaces n ON n.id = a.namespace WHERE n.name = ?", (namespace,)
        )
        return row.fetchone()[0]


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


def _unpacked(data: bytes) -> array[int]:
    found = array("I")
    found.frombytes(data)
    return found
