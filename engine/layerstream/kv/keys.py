"""The names of pages: which of them are the same, in memory and on disk, in this process and the next.

A *page key* is SHA-256(parent key ‖ token ids of the page); the first page's parent is empty, or follows from the
tenant that the prompt belongs to. Equal keys therefore mean equal tokens from position 0 on and the same tenant, and
the key of a page says all that its KV depends on, but for the model and its arithmetic, which a store's namespace
stands for. Pages of a prompt whose passages were moved have keys of their own.

What is stored is found by these names: another way of making them loses every store that there is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from layerstream.core.passages import Passage

Key = bytes


def page_keys(
    token_ids: Sequence[int], page_tokens: int, tenant: str = "", passages: Sequence[Passage] = ()
) -> list[Key]:
    """Keys of the whole pages of *token_ids*, the last token left out, of *tenant*; empty: the engine's own.

    Where *passages* are moved, pages from the first of their tokens on have keys that no prompt has which was computed
    as it stands: they say what was moved, and from where.
    """
    keys: list[Key] = []
    parent = tenant_key(tenant)
    for start in range(0, (len(token_ids) - 1) // page_tokens * page_tokens, page_tokens):
        moved = [passage for passage in passages if passage.start < start + page_tokens and start < passage.stop]
        blended = "".join(f"moved {part.start} {part.stop} {part.source} {part.how};" for part in moved).encode()
        page = array("q", token_ids[start : start + page_tokens]).tobytes()
        parent = hashlib.sha256(parent + page + blended).digest()
        keys.append(parent)
    return keys


def tenant_key(tenant: str) -> Key:
    """What the first page of *tenant*'s prompts has for a parent; of the engine's own it is empty."""
    return hashlib.sha256(b"tenant" + tenant.encode(errors="surrogatepass")).digest() if tenant else b""


def snapshot_key(key: Key) -> Key:
    """Under which the states of recurrent layers after the page *key* are stored."""
    return hashlib.sha256(b"state" + key).digest()
