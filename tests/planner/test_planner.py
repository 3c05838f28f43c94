"""The plan: what fits where. Pure, so no model is needed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream import LayerStream
from layerstream.errors import BudgetTooSmall
from layerstream.planner import ModelFacts, Plan, make_plan, on_host
from layerstream.planner import facts as assumed
from layerstream.planner.facts import RESIDENT_ROWS
from layerstream.planner.units import PlannedUnit, WeightNode

MIB = 2**20


def layer(index: int, hidden: int, intermediate: int) -> WeightNode:
    """A decoder layer as Llama has it, in bf16."""

    def linear(name: str, rows: int, columns: int) -> WeightNode:
        size = 2 * rows * columns
        return WeightNode(f"layers.{index}.{name}", size, size, num_rows=rows)

    attention = tuple(linear(f"attn.{name}", hidden, hidden) for name in "qkvo")
    mlp = tuple(linear(f"mlp.{name}", intermediate, hidden) for name in ("gate", "up", "down"))
    children = (
        WeightNode(f"layers.{index}.attn", children=attention),
        WeightNode(f"layers.{index}.mlp", children=mlp),
        WeightNode(f"layers.{index}.norm", 2 * hidden, 2 * hidden),
    )
    return WeightNode(f"layers.{index}", layer=index, children=children)


def facts(hidden: int = 1024, layers: int = 16, vocab: int = 32000, context: int = 8192) -> ModelFacts:
    intermediate = 4 * hidden
    head = 2 * hidden * vocab
    return ModelFacts(
        body=(*(layer(index, hidden, intermediate) for index in range(layers)), WeightNode("norm", 2048, 2048)),
        head=WeightNode("lm_head", head, head, num_rows=vocab),
        embedding_bytes=head,
        layer_kv=(hidden,) * layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        itemsize=2,
        context_length=context,
    )


def test_what_fits_is_resident_and_streams_nothing() -> None:
    plan = make_plan(facts(), 4096 * MIB)
    assert not plan.streams
    assert plan.streamed_bytes == 0
    assert plan.embedding_resident
    assert plan.decode_rows == RESIDENT_ROWS


def test_what_does_not_fit_streams_all_but_a_fixed_set() -> None:
    plan = make_plan(facts(), 400 * MIB)
    assert plan.streams
    total = sum(unit.num_bytes for unit in plan.weights.units)
    assert plan.streamed_bytes + sum(plan.weights.units[i].num_bytes for i in plan.weights.residents) == total
    assert plan.decode_rows == assumed.STREAMING_ROWS


@given(budget=st.integers(20, 700), hidden=st.sampled_from([256, 1024, 2048]), layers=st.integers(1, 12))
def test_no_plan_spends_more_than_its_budget(budget: int, hidden: int, layers: int) -> None:
    model = facts(hidden, layers)
    try:
        plan = make_plan(model, budget * MIB)
    except BudgetTooSmall as error:
        assert error.required_bytes > budget * MIB  # noqa: PT017  # the other branch is the test
        return
    assert plan.planned_bytes <= plan.budget_bytes
    names = [unit.name for unit in plan.weights.units]
    assert len(set(names)) == len(names)
    assert sum(unit.num_bytes for unit in plan.weights.units) == pytest.approx(
        sum(node.total_bytes for node in (*model.body, model.head)), abs=64 * len(names)
    )
    if plan.streams:
        streamed = [unit for i, unit in enumerate(plan.weights.units) if i not in plan.weights.residents]
        assert plan.weights.ring_bytes >= 2 * max(unit.ring_bytes for unit in streamed)


@settings(max_examples=20)
@given(hidden=st.sampled_from([256, 1024, 2048]), layers=st.integers(1, 6), vocab=st.sampled_from([1024, 128256]))
def test_the_minimum_that_the_error_names_is_enough(hidden: int, layers: int, vocab: int) -> None:
    model = facts(hidden, layers, vocab)
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(model, 1)
    assert make_plan(model, caught.value.required_bytes).planned_bytes <= caught.value.required_bytes
    with pytest.raises(BudgetTooSmall):
        make_plan(model, caught.value.required_bytes - 1)


@given(smaller=st.integers(60, 450), more=st.integers(1, 200))
def test_more_memory_never_streams_more_by_more_than_a_unit(smaller: int, more: int) -> None:
    model = facts(layers=6)
    before, after = (make_plan(model, size * MIB) for size in (smaller, smaller + more))
    largest = max(node.total_bytes for node in model.body)
    slack = largest + max(0, after.kv_bytes - before.kv_bytes) + (after.activation_bytes - before.activation_bytes)
    slack += max(0, after.weights.ring_bytes - before.weights.ring_bytes)
    assert after.streamed_bytes <= before.streamed_bytes + slack


def test_fused_experts_that_cannot_be_cut_are_named_with_the_budget_they_need() -> None:
    experts = WeightNode("layers.0.experts", 300 * MIB, 300 * MIB)
    model = dataclasses.replace(facts(), body=(WeightNode("layers.0", children=(experts,)),))
    with pytest.raises(BudgetTooSmall, match=r"layers\.0\.experts, has 300\.0 MiB") as caught:
        make_plan(model, 340 * MIB)
    assert caught.value.required_bytes > 600 * MIB


def test_kv_has_room_for_a_retrieved_context_where_the_budget_allows() -> None:
    plan = make_plan(facts(), 600 * MIB)
    assert plan.num_pages * plan.page_tokens >= on_host.WANTED_KV_TOKENS


def test_a_short_context_takes_no_more_kv_than_its_sequences() -> None:
    plan = make_plan(facts(context=100), 4096 * MIB)
    assert plan.num_pages * plan.page_tokens <= on_host.MAX_KV_SEQUENCES * (100 + plan.page_tokens)


def test_weights_stored_in_another_dtype_have_room_for_their_conversion() -> None:
    node = WeightNode("layers.0", 8 * MIB, 16 * MIB)
    stored = dataclasses.replace(facts(), body=(node,) * 8)
    plain = dataclasses.replace(facts(), body=(WeightNode("layers.0", 8 * MIB, 8 * MIB),) * 8)
    extra = make_plan(stored, 150 * MIB).activation_bytes - make_plan(plain, 150 * MIB).activation_bytes
    assert extra == 16 * MIB


def test_the_plan_prints_where_everything_goes() -> None:
    text = str(make_plan(facts(), 400 * MIB))
    assert "400.0 MiB" in text
    assert all(line in text for line in ("resident weights", "ring", "KV pages", "read per sweep"))
    assert max(map(len, text.splitlines())) <= 80


def quantised(kernel: str = "", layers: int = 8) -> ModelFacts:
    """A model whose Linears are stored in 4 bits, multiplied by with *kernel* if there is one."""

    def pack(node: WeightNode) -> WeightNode:
        if not node.num_rows:
            return dataclasses.replace(node, children=tuple(map(pack, node.children)))
        size = node.own_bytes // 4
        return dataclasses.replace(
            node, own_bytes=size, compute_bytes=size, decode_bytes=MIB, value_bytes=node.own_bytes, kernel=kernel
        )

    plain = facts(layers=layers, context=512)
    return dataclasses.replace(plain, body=tuple(map(pack, plain.body)), head=pack(plain.head))


def test_quantised_weights_without_a_kernel_stay_decoded_where_there_is_room() -> None:
    model = quantised()
    assert all(unit.stays_decoded for unit in _packed(make_plan(model, 4096 * MIB)))
    tight = make_plan(model, 290 * MIB)
    assert not tight.streams
    assert tight.weights.head[0].stays_decoded, "the head first"
    assert not all(unit.stays_decoded for unit in _packed(tight))
    assert not tight.embedding_resident, "its rows are quick to read; decoding is not"
    assert tight.kv_bytes >= 512 * model.kv_token_bytes


def test_quantised_weights_with_a_kernel_stay_as_they_are() -> None:
    plan = make_plan(dataclasses.replace(quantised("int4"), fused_rows={"int4": 64}), 4096 * MIB)
    assert not any(unit.stays_decoded for unit in _packed(plan))
    assert plan.embedding_resident
    assert plan.decode_rows == RESIDENT_ROWS
    slow = dataclasses.replace(quantised("int4"), fused_rows={"int4": 4})
    assert make_plan(slow, 4096 * MIB).decode_rows == 4


@given(budget=st.integers(20, 1500), layers=st.integers(1, 16), rows=st.sampled_from([0, 2, 64]))
def test_no_plan_of_quantised_weights_spends_more_than_its_budget(budget: int, layers: int, rows: int) -> None:
    model = dataclasses.replace(quantised("int4", layers), fused_rows={"int4": rows} if rows else {})
    try:
        plan = make_plan(model, budget * MIB)
    except BudgetTooSmall as error:
        assert error.required_bytes > budget * MIB  # noqa: PT017  # the other branch is the test
        return
    assert plan.planned_bytes <= plan.budget_bytes


def _packed(plan: Plan) -> list[PlannedUnit]:
    return [unit for unit in plan.weights.units if unit.num_bytes > 16 * 1024]


def test_a_plan_is_one_line_where_it_is_shown(engine: LayerStream) -> None:
    shown = repr(engine.plan)
    assert "\n" not in shown
    assert len(shown) < 120
    assert f"KV for {engine.plan.num_pages * engine.plan.page_tokens:,} tokens" in shown
    assert str(engine.plan).count("\n") > 5
