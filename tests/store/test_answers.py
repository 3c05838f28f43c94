"""What was answered is remembered with its prefix, bounded, per tenant, and goes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream.hardware.reader import DirectReader
from layerstream.store import answers
from layerstream.store.answers import Answers, RememberedAnswer, note, places
from layerstream.store.tiers.folder import StoreFolder
from layerstream.store.tiers.local import LocalTier

from tests.store.pages import ROOMY, chain, new_pages

KEYS = chain("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path):
    folder = StoreFolder(tmp_path / "kv")
    yield folder
    folder.close()


def open_tier(folder: StoreFolder, namespace: str = "n" * 16) -> LocalTier:
    return LocalTier(folder, namespace, {"model": "m"}, ROOMY, DirectReader())


def item(question: int, prefix: bytes = KEYS[-1]) -> RememberedAnswer:
    return RememberedAnswer(prefix, (question, 1), (question, 2, 3))


def test_the_newest_come_first_and_a_repeated_question_is_one(folder: StoreFolder) -> None:
    tier = open_tier(folder)
    tier.put(new_pages(KEYS))
    for question in (5, 6, 5):
        assert tier.remember(item(question))
    assert tier.recall([KEYS[-1]]) == [[5, 1, 5, 2, 3], [6, 1, 6, 2, 3]]
    assert tier.recall([KEYS[0]]) == []


def test_only_what_hangs_on_a_stored_page_is_kept(folder: StoreFolder) -> None:
    tier = open_tier(folder)
    assert not tier.remember(item(5))
    assert tier.remember(item(5, prefix=b"")), "a prompt shorter than a page"
    assert tier.recall([b""]) == [[5, 1, 5, 2, 3]]


def test_it_goes_with_its_page(folder: StoreFolder) -> None:
    tier = open_tier(folder)
    tier.put(new_pages(KEYS))
    tier.remember(item(5))
    tier.drop(KEYS[1])
    assert tier.recall([KEYS[-1]]) == []
    tier.put(new_pages(KEYS[1:], KEYS[0]))
    tier.remember(item(6))
    folder.index.remove_namespace("n" * 16)
    assert Answers(folder.index).count("n" * 16) == 0


def test_tenants_do_not_see_each_other(folder: StoreFolder) -> None:
    one, other = open_tier(folder), open_tier(folder, "o" * 16)
    for tier in (one, other):
        tier.put(new_pages(KEYS))
    one.remember(item(5))
    assert other.recall([KEYS[-1], b""]) == []


def test_bounded(folder: StoreFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_PER_PREFIX", 4)
    monkeypatch.setattr(answers, "MOST_ANSWERS", 6)
    monkeypatch.setattr(answers, "MOST_RECALLED", 3)
    tier = open_tier(folder)
    tier.put(new_pages(KEYS))
    for question in range(9):
        tier.remember(item(question))
    assert [found[0] for found in tier.recall([KEYS[-1]])] == [8, 7, 6]
    assert Answers(folder.index).count("n" * 16) == 4
    for question in range(9):
        tier.remember(item(question, KEYS[0]))
    assert Answers(folder.index).count("n" * 16) == 6


def test_questions_of_different_lengths_meet() -> None:
    """Where an answer hangs depends on its prompt's length; it is looked for around there."""
    context = list(range(1000))
    size = 32
    for length in (5, 40, 100):
        prompt = [*context, *range(2000, 2000 + length)]
        keys = chain(*range((len(prompt) - 1) // size))
        kept = note(keys, size, prompt, [1, 2])
        assert list(kept.question) == prompt[len(prompt) - len(kept.question) :]
        assert len(kept.question) >= answers.NEAR_TOKENS
        for other in (5, 40, 100):
            assert kept.prefix in places(keys[: (1000 + other - 1) // size], size, 1000 + other)
