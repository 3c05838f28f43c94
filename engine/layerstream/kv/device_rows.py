"""Where on a device the rows of a sweep are written, and what they read: numbers of rows of a layer's pool. Pure.

A pool has the rows of all pages, page after page, and one more that belongs to nobody: the *spare* row, where padding
is written and what padding reads. All layers of a device have pools of the same shape, so that the numbers are made
once for a sweep.

Guesses are written where the pages will have them. Where guesses of a sequence compete for a position, only one path
can be there at a time: then a block attends in *waves*. Each wave first puts one path of every such sequence in place,
and then the rows attend that have not yet and whose path that is. The first path comes last, because it is the
likeliest to be accepted, and what is in place at the end stays.

Which rows a call of a kernel has is up to the spans alone: rows that stand alone are never in one call with the rows of
longer spans, whose kernels see a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from layerstream.core.draft import DraftTree
from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sight import Sight
from layerstream.core.sweep import RowBlock, Span, Sweep

GATHERED_ROWS = 2**15  # of keys, that one call gathers at most
STAGED_ROWS = 256  # that have room in host memory to leave side by side


@dataclass(frozen=True, slots=True)
class Query:
    """Rows ``[row, row + count)`` of a block, neighbours of a sequence; they see the *length* keys that end with their
    own, or less where there is a mask.

    Attributes:
        begin: the pool's row with the first key, if the keys are neighbours there; else -1.
        keys: the pool's rows with the keys, page by page as ``(first, count)``; empty if they are neighbours.
    """

    row: int
    count: int
    begin: int
    length: int
    keys: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """Queries of one call.

    Attributes:
        is_whole: the queries are all rows of the block in their order, one row each, and nothing is gathered.
        is_alone: every query is one row, which sees all of its keys.
    """

    queries: tuple[Query, ...]
    is_whole: bool
    is_alone: bool

    @property
    def is_gathered(self) -> bool:
        """Whether keys have to be gathered first."""
        return any(query.keys for query in self.queries)

    @property
    def rows(self) -> list[int]:
        """The block's rows, one query after the other."""
        return [row for query in self.queries for row in range(query.row, query.row + query.count)]


@dataclass(frozen=True, slots=True)
class Wave:
    """What is put in place, and who attends then.

    Attributes:
        moves: guesses as ``(block, row of it, row of the pool)``; the block is a number in the sweep.
        spans: each with its row in the block.
    """

    moves: tuple[tuple[int, int, int], ...]
    spans: tuple[tuple[int, Span], ...]


@dataclass(frozen=True)
class BlockRows:
    """The rows of one block.

    Attributes:
        targets: for each row of the block the pool's row that it is written to.
        waves: one, unless guesses compete.
        pages: that are written to.
    """

    number: int
    block: RowBlock
    targets: tuple[int, ...]
    waves: tuple[Wave, ...]
    pages: frozenset[int]

    @property
    def is_staged(self) -> bool:
        """Whether its rows leave for the host side by side: those of prompts fill pages, and leave page by page."""
        return self.has_guesses or not self.block.is_prompt

    @property
    def has_guesses(self) -> bool:
        """Whether any of its rows is a guess."""
        return any(span.is_drafted for span in self.block.spans)

    def known(self) -> Iterator[tuple[int, int]]:
        """Rows that are no guesses, each with the pool's row that it is written to."""
        for at, span in self.block.spans_from(0):
            if not span.is_drafted:
                yield from ((row, self.targets[row]) for row in range(at, at + len(span)))


@dataclass(frozen=True)
class SweepRows:
    """The rows of a sweep.

    Attributes:
        blocks: in the sweep's order.
        placed: the path of guesses that is in place when the sweep is over, for each sequence that has some.
    """

    blocks: tuple[BlockRows, ...]
    placed: Mapping[TokenSequence, tuple[int, ...]]
    page_tokens: int
    spare: int

    def readings(self, number: int, wave: int, sight: Sight) -> list[Reading]:
        """The calls that block *number* attends by in one of its waves."""
        rows = self.blocks[number]
        queries = [query for row, span in rows.waves[wave].spans for query in self._queries(row, span, sight)]
        if len(rows.waves) == 1 and all(query.count == 1 and not query.keys for query in queries):
            padding = range(rows.block.num_used, rows.block.num_rows)
            queries += [Query(row, 1, self.spare, 1) for row in padding]
        alone = [query for query in queries if query.count == 1]
        longer = [query for query in queries if query.count > 1]
        found = []
        for some, is_alone in ((alone, True), (longer, False)):
            here = tuple(query for query in some if not query.keys)
            if here:
                found.append(Reading(here, is_alone and len(here) == rows.block.num_rows, is_alone))
            gathered = (
                Reading(group, False, is_alone)
                for group in _groups((q for q in some if q.keys), min(GATHERED_ROWS, self.spare))
            )
            found.extend(gathered)
        return found

    def _queries(self, row: int, span: Span, sight: Sight) -> Iterator[Query]:
        tokens = self.page_tokens
        for start, stop in sight.parts(span.start, span.stop):
            first = sight.first(start)
            pages = span.sequence.pages[first // tokens : (stop - 1) // tokens + 1]
            within, length, at = first % tokens, stop - first, row + start - span.start
            if _are_neighbours(pages):
                yield Query(at, stop - start, pages[0] * tokens + within, length)
            else:
                yield Query(at, stop - start, -1, length, tuple(_pieces(pages, tokens, within, length)))


def rows_of(sweep: Sweep, page_tokens: int, num_pages: int) -> SweepRows:
    """The rows of *sweep*, in pools of *num_pages* pages."""
    spare = num_pages * page_tokens
    drafts = {sequence: _Paths.of(tree) for sequence, tree in sweep.drafts.items()}
    known: dict[TokenSequence, dict[int, tuple[int, int]]] = {}  # nodes' rows in the blocks so far
    placed: dict[TokenSequence, tuple[int, ...]] = {}
    blocks = []
    for number, block in enumerate(sweep.blocks):
        targets, pages = [spare] * block.num_rows, set[int]()
        nodes: dict[TokenSequence, list[int]] = {}
        for at, span in block.spans_from(0):
            pages.update(span.sequence.pages[span.start // page_tokens : (span.stop - 1) // page_tokens + 1])
            if span.is_drafted:
                known.setdefault(span.sequence, {})[span.node] = number, at
                nodes.setdefault(span.sequence, []).append(span.node)
            if not span.is_drafted or drafts[span.sequence].is_chain:
                for place, position in enumerate(range(span.start, span.stop), start=at):
                    targets[place] = pool_row(span.sequence, position, page_tokens)
        turns = {sequence: drafts[sequence].wanted(own) for sequence, own in nodes.items()}
        placed |= {sequence: wanted[-1][0] for sequence, wanted in turns.items()}
        waves = _waves(block, turns, known, drafts, page_tokens)
        blocks.append(BlockRows(number, block, tuple(targets), waves, frozenset(pages)))
    return SweepRows(tuple(blocks), placed, page_tokens, spare)


@dataclass
class _Paths:
    """The paths from root to leaf of a tree, the first one last."""

    tree: DraftTree
    paths: tuple[tuple[int, ...], ...] = field(default=())

    @classmethod
    def of(cls, tree: DraftTree) -> _Paths:
        leaves = set(range(len(tree))) - set(tree.parents)
        return cls(tree, tuple(tree.paths[leaf] for leaf in sorted(leaves, reverse=True)))

    @property
    def is_chain(self) -> bool:
        return len(self.paths) == 1

    def wanted(self, nodes: Iterable[int]) -> list[tuple[tuple[int, ...], list[int]]]:
        """The paths that *nodes* attend on, in order, each with those that do it then."""
        left, found = set(nodes), []
        for path in self.paths:
            now = sorted(left.intersection(path))
            if now:
                found.append((path, now))
                left.difference_update(now)
        return found


def _waves(
    block: RowBlock,
    steps: Mapping[TokenSequence, Sequence[tuple[tuple[int, ...], list[int]]]],
    known: Mapping[TokenSequence, Mapping[int, tuple[int, int]]],
    drafts: Mapping[TokenSequence, _Paths],
    page_tokens: int,
) -> tuple[Wave, ...]:
    """*steps*: the paths that the guesses of each sequence in *block* attend on, and which do it then."""
    turns: dict[tuple[TokenSequence, int], int] = {}  # the wave of each competing node
    moves: list[list[tuple[int, int, int]]] = [[]]
    for sequence, wanted in steps.items():
        if drafts[sequence].is_chain:
            continue
        moves.extend([] for _ in range(len(wanted) - len(moves)))
        root = sequence.num_tokens - 1
        for turn, (path, now) in enumerate(wanted):
            turns.update({(sequence, node): turn for node in now})
            there = ((node, known[sequence][node]) for node in path if node in known[sequence])
            moves[turn].extend(
                (*place, pool_row(sequence, root + drafts[sequence].tree.depths[node], page_tokens))
                for node, place in there
            )
    spans: list[list[tuple[int, Span]]] = [[] for _ in moves]
    for at, span in block.spans_from(0):
        spans[turns.get((span.sequence, span.node), 0)].append((at, span))
    return tuple(Wave(tuple(moved), tuple(some)) for moved, some in zip(moves, spans, strict=True))


def pool_row(sequence: TokenSequence, position: int, page_tokens: int) -> int:
    """The row of a pool, and of a layer's tensors on the host, with the token at *position*."""
    return sequence.pages[position // page_tokens] * page_tokens + position % page_tokens


def _are_neighbours(pages: Sequence[int]) -> bool:
    return pages[-1] - pages[0] == len(pages) - 1 and all(b - a == 1 for a, b in pairwise(pages))


def _pieces(pages: Sequence[int], tokens: int, within: int, length: int) -> Iterator[tuple[int, int]]:
    """Pool rows of *length* keys in *pages*, of which the first has *within* others before them."""
    for page in pages:
        count = min(tokens - within, length)
        yield page * tokens + within, count
        length -= count
        within = 0


def _groups(queries: Iterable[Query], most: int) -> Iterator[tuple[Query, ...]]:
    """*queries* whose keys are gathered, those of at most *most* rows at once, or of one."""
    group: list[Query] = []
    num_rows = 0
    for query in queries:
        if group and num_rows + query.length > most:
            yield tuple(group)
            group, num_rows = [], 0
        group.append(query)
        num_rows += query.length
    if group:
        yield tuple(group)


def staged_rows(decode_rows: int, most: int) -> int:
    """Rows that have room to leave side by side: of *most* decode rows and guesses in a sweep, in whole blocks."""
    return min(-(-most // decode_rows) * decode_rows, max(decode_rows, STAGED_ROWS))
