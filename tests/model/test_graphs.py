"""Graphs of decode sweeps, on a device that plays back what was done on its tensors and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layerstream.model.graphs import Graphs
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.stepping import step_greedily

from benchmarks import launches
from tests.harness import add_tokenizer, device_config, draw_prompt
from tests.models import make_model
from tests.pretend import PretendCuda, pretend_cuda

NEW_TOKENS = 7


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    with pretend_cuda(monkeypatch) as device:
        yield device


def make_parts(folder: Path, dtype: str, **options: Any) -> Assembly:
    config = device_config(folder, "resident", dtype, **options)
    return assemble(replace(config, memory_bytes=4 * (config.memory_bytes or 0)), None)


def graphs_of(parts: Assembly) -> Graphs | None:
    return parts.step._runner._graphs


def run(parts: Assembly, count: int, between: Callable[[], None] | None = None) -> tuple[Any, Any]:
    return step_greedily(parts, [draw_prompt(5 + 3 * at, at) for at in range(count)], NEW_TOKENS, between=between)


def check_alike(parts: Assembly, plain: Assembly, counts: Sequence[int]) -> None:
    """For each of *counts* sequences, one after the other, both give the same tokens and, bit for bit, logits."""
    for count in counts:
        (tokens, logits), (expected_tokens, expected) = run(parts, count), run(plain, count)
        assert tokens == expected_tokens
        assert all(map(torch.equal, logits, expected))


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")])
def test_graphs_change_no_bit(family: str, dtype: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model(family, tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with_graphs, without = make_parts(tmp_path, dtype), make_parts(tmp_path, dtype, cuda_graphs=False)
    try:
        assert graphs_of(without) is None
        check_alike(with_graphs, without, (1, 4, 2))  # one graph has them all
        graphs = graphs_of(with_graphs)
        assert graphs is not None
        assert graphs.num_replays >= 3 * (NEW_TOKENS - 1) - 3
        ((graph,),) = filter(None, graphs._graphs.values())
        (block,) = graph.blocks
        (calls,) = block.waves[0].calls.values()
        assert all(call.repeated for call in calls), "what was made of numbers before the capture is the graph's"
    finally:
        with_graphs.close()
        without.close()


def test_experts_are_in_a_graph_for_each_number_of_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("mixtral", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    with_graphs, without = make_parts(tmp_path, "float32"), make_parts(tmp_path, "float32", cuda_graphs=False)
    try:
        check_alike(with_graphs, without, (2, 3, 2))
        graphs = graphs_of(with_graphs)
        assert graphs is not None
        assert graphs.num_replays == 3 * (NEW_TOKENS - 1) - 1 - 2  # but for the first sweep, and one for each graph
    finally:
        with_graphs.close()
        without.close()


def test_no_python_of_the_model_runs_in_a_replay(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts, calls = make_parts(tmp_path, "float32"), []
    runner = parts.step._runner
    decode = runner._decode
    runner._decode = lambda **inputs: calls.append(1) or decode(**inputs)
    try:
        run(parts, 2)
        graphs = graphs_of(parts)
        assert graphs is not None
        # a prompt's sweep, the first one of its kind, and twice to capture
        assert len(calls) == 4
        assert graphs.num_replays == NEW_TOKENS - 1 - 2
    finally:
        parts.close()


def test_who_asks_how_many_rows_there_are_has_a_graph_for_each_number(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts, plain = make_parts(tmp_path, "float32"), make_parts(tmp_path, "float32", cuda_graphs=False)
    _scale_by_used_rows(parts)
    _scale_by_used_rows(plain)
    try:
        check_alike(parts, plain, (1, 3, 1, 3))
        graphs = graphs_of(parts)
        assert graphs is not None
        assert sorted(g.num_used or 0 for [*some] in graphs._graphs.values() for g in some) == [
            1,
            3,
        ]
    finally:
        parts.close()
        plain.close()


def _scale_by_used_rows(parts: Assembly) -> None:
    """What a row becomes is up to how many there are: as if a kernel had left padding out."""
    from layerstream.model.context import current

    layer = parts.skeleton.decoder.layers[1]
    forward = layer.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = current().rows_in_hand()
        return forward(hidden * (1.0 + rows[0].used - rows[0].start), *args, **kwargs)

    layer.forward = run


def test_who_waits_for_the_device_ends_graphs(tmp_path: Path, tokenizer_folder: Path) -> None:
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts, plain = make_parts(tmp_path, "float32"), make_parts(tmp_path, "float32", cuda_graphs=False)
    norm = parts.skeleton.decoder.norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) if float(hidden.abs().max().item()) >= 0 else hidden
    try:
        assert run(parts, 2)[0] == run(plain, 2)[0]
        graphs = graphs_of(parts)
        assert graphs is not None
        assert graphs._is_given_up
        assert not graphs.num_replays
    finally:
        parts.close()
        plain.close()


def test_where_memory_runs_out_there_are_no_graphs(
    tmp_path: Path, tokenizer_folder: Path, cuda: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, work: Callable[[], Any]) -> None:
        work()
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(PretendCuda, "capture", fail)
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path, tokenizer_folder)
    parts, plain = make_parts(tmp_path, "float32"), make_parts(tmp_path, "float32", cuda_graphs=False)
    try:
        assert run(parts, 2)[0] == run(plain, 2)[0]
        graphs = graphs_of(parts)
        assert graphs is not None
        assert graphs._is_given_up
    finally:
        parts.close()
        plain.close()


def test_quantised_matrices_have_one_graph_for_all_numbers(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = next(iter(launches.write("dense", "nf4", tmp_path).values()))
    add_tokenizer(folder, tokenizer_folder)
    parts = make_parts(folder, "bfloat16")
    try:
        for count in (1, 3):
            step_greedily(parts, [draw_prompt(5, at) for at in range(count)], 4)
        graphs = graphs_of(parts)
        assert graphs is not None
        assert [graph.num_used for some in graphs._graphs.values() for graph in some] == [None]
    finally:
        parts.close()
