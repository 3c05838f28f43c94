"""Every scan gives the numbers of transformers' function, whole, piece by piece and step by step, from any state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layerstream.model import elementwise
from layerstream.model.scans import SCANS, VERSION, Call, fused, identity
from layerstream.model.scans.rows import PIECE
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

TOLERANCE = (
    3e-5  # of the largest value: exponents are differences of sums, which reach some hundreds where decay is steep
)


@dataclass(frozen=True)
class Given:
    """Arguments of a call."""

    name: str
    function: Callable[..., Any]
    positional: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def rows_at(self) -> int:
        """The dimension of the output's rows."""
        return 2 if self.name in ("causal_conv1d_fn", "mamba_selective_scan") else 1

    def bound(self) -> Call:
        """As a call of ours."""
        return SCANS[self.name](*self.positional, **self.named)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What transformers computes, and the state after it without the batch, if it tells."""
        found = self.function(*self.positional, **self.named)
        return (found[0], found[1][0]) if isinstance(found, tuple) else (found, None)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Given:
        """With *change* of every tensor."""

        def of(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        named = {name: of(value) for name, value in self.named.items()}
        return Given(self.name, self.function, tuple(map(of, self.positional)), named)


class Random:
    """Numbers of a dtype that a seed makes."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return self.exact(*shape).to(self._dtype)

    def exact(self, *shape: int) -> torch.Tensor:
        """In fp32."""
        return torch.randn(shape, generator=self._generator)


def convolution(n: int, r: Random, channels: int = 24) -> Given:
    tensors = (r(1, n, channels).mT, r(channels, 4))
    return Given("causal_conv1d_fn", qwen.causal_conv1d_fn, tensors, {"activation": "silu"})


def biased_convolution(n: int, r: Random) -> Given:
    return Given("causal_conv1d_fn", qwen.causal_conv1d_fn, (r(1, n, 20).mT, r(20, 3), r(20)))


def delta_rule(n: int, r: Random, name: str = "torch_chunk_gated_delta_rule", heads: int = 6, width: int = 8) -> Given:
    function = getattr(qwen, name)
    named = {"g": -r.exact(1, n, heads).abs(), "beta": r(1, n, heads).sigmoid()}
    flags = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    return Given(name, function, (r(1, n, 2, 16), r(1, n, 2, 16), r(1, n, heads, width)), named | flags)


def recurrent_delta_rule(n: int, r: Random) -> Given:
    return delta_rule(n, r, "torch_recurrent_gated_delta_rule", heads=2)


def channel_decay(n: int, r: Random, name: str = "chunk_kimi_delta_attention", steepness: float = 1.0) -> Given:
    named = {"g": -steepness * r.exact(1, n, 3, 16).abs(), "beta": r(1, n, 3).sigmoid(), "initial_state": None}
    flags = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    function = getattr(kimi, name)
    return Given(name, function, (r(1, n, 3, 16), r(1, n, 3, 16), r(1, n, 3, 8)), named | flags)


def recurrent_channel_decay(n: int, r: Random) -> Given:
    return channel_decay(n, r, "recurrent_kimi_delta_attention")


def steep_channel_decay(n: int, r: Random) -> Given:
    return channel_decay(n, r, steepness=5)


def state_space(n: int, r: Random, heads: int = 6, width: int = 8, groups: int = 2) -> Given:
    named = {"chunk_size": 32, "D": r(heads), "dt_bias": r(heads), "dt_softplus": True, "dt_limit": (0.1, 2.0)}
    tensors = (r(1, n, heads, width), r(1, n, heads), -r.exact(heads).exp(), r(1, n, groups, 16), r(1, n, groups, 16))
    return Given("mamba2_chunk_scan", mamba2.mamba2_chunk_scan, tensors, {**named, "return_final_states": True})


def plain_state_space(n: int, r: Random) -> Given:
    tensors = (r(1, n, 4, 8), r(1, n, 4).abs(), -r.exact(4).exp(), r(1, n, 1, 16), r(1, n, 1, 16))
    return Given("mamba2_chunk_scan", mamba2.mamba2_chunk_scan, tensors, {"chunk_size": 256})


def selective_scan(n: int, r: Random, channels: int = 24) -> Given:
    named = {"D": r.exact(channels), "z": r(1, channels, n), "delta_bias": r.exact(channels), "delta_softplus": True}
    inputs = (r(1, channels, n), r(1, channels, n), -r.exact(channels, 16).exp())
    tensors = (*inputs, r(1, n, 16).mT, r(1, n, 16).mT)
    return Given("mamba_selective_scan", mamba.mamba_selective_scan, tensors, {**named, "return_last_state": True})


def plain_selective_scan(n: int, r: Random) -> Given:
    tensors = (r(1, 24, n), r(1, 24, n).abs(), -r.exact(24, 16).exp(), r(1, n, 16).mT, r(1, n, 16).mT)
    return Given("mamba_selective_scan", mamba.mamba_selective_scan, tensors, {"D": r.exact(24)})


KINDS = (
    convolution,
    biased_convolution,
    delta_rule,
    recurrent_delta_rule,
    channel_decay,
    recurrent_channel_decay,
    steep_channel_decay,
    state_space,
    plain_state_space,
    selective_scan,
    plain_selective_scan,
)
WIDE = {  # more than one thread takes a part of them
    "convolution": partial(convolution, channels=40003),
    "delta rule": partial(delta_rule, heads=50, width=65),
    "state space": partial(state_space, heads=50, width=65),
    "state space of one group": partial(state_space, heads=50, width=65, groups=1),
    "selective scan": partial(selective_scan, channels=4099),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Kind = Callable[[int, Random], Given]


def room(call: Call) -> torch.Tensor:
    """For a state, with nothing in it that may be read."""
    return torch.full(call.part.shape, float("nan"), dtype=getattr(torch, call.part.dtype))


def tensors_of(item: Any) -> list[torch.Tensor]:
    """All that a call, or a part of one, holds."""
    if isinstance(item, torch.Tensor):
        return [item]
    parts = [getattr(item, part.name) for part in fields(item)] if is_dataclass(item) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


def run(call: Call, cuts: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of spans that end at *cuts*, and the last state."""
    outputs: list[torch.Tensor] = []
    state: torch.Tensor | None = None
    for start, stop in zip([0, *cuts], cuts, strict=False):
        left = room(call)
        outputs.append(call.cut(slice(start, stop)).chunk(state, left))
        state = left
    assert state is not None
    return outputs, state


def stepped(call: Call) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs row by row, and the last state, which every step writes over."""
    left = room(call)
    rows = range(call.num_rows)
    return [call.cut(slice(row, row + 1)).step(left if row else None, left) for row in rows], left


def whole(call: Call, outputs: list[torch.Tensor], cuts: list[int]) -> torch.Tensor:
    """As the module gets it."""
    spans = [slice(start, stop) for start, stop in zip([0, *cuts], cuts, strict=False)]
    found = call.joined(outputs, spans)
    if not isinstance(found, tuple):
        return found
    assert found[1].numel() == 0
    return found[0]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Within *tolerance* of the largest value."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@every_kind
@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 150])
def test_as_transformers_whole_and_step_by_step(kind: Kind, num_rows: int) -> None:
    args = kind(num_rows, Random(num_rows, torch.float32))
    expected, state = args.expected()
    call = args.bound()
    assert call.num_rows == num_rows
    outputs, left = run(call, [num_rows])
    close(whole(call, outputs, [num_rows]), expected)
    steps, last = stepped(call)
    close(whole(call, steps, list(range(1, num_rows + 1))), expected)
    for found in (left, last):
        assert torch.isfinite(found).all()
        if state is not None:
            close(found, state)
    close(last, left)


@every_kind
def test_narrow_inputs_are_computed_in_fp32(kind: Kind) -> None:
    """Inputs of bf16 give what the same numbers in fp32 give, rounded once."""
    narrow = kind(100, Random(1, torch.bfloat16))
    call = narrow.bound()
    outputs, left = run(call, [100])
    expected, _ = narrow.mapped(torch.Tensor.float).expected()
    found = whole(call, outputs, [100])
    assert found.dtype == narrow.expected()[0].dtype
    close(found.float(), expected, tolerance=4e-3 if found.dtype == torch.bfloat16 else TOLERANCE)
    assert left.dtype == (torch.bfloat16 if call.part.name == "conv" else torch.float32)


@every_kind
@settings(max_examples=12)
@given(data=st.data())
def test_cut_anywhere_the_numbers_stay_and_cut_after_pieces_the_bits(kind: Kind, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(2, 200))
    call = kind(num_rows, Random(num_rows, torch.float32)).bound()
    expected, state = run(call, [num_rows])
    anywhere = [*data.draw(st.sets(st.integers(1, num_rows - 1), max_size=4).map(sorted)), num_rows]
    outputs, left = run(call, anywhere)
    close(whole(call, outputs, anywhere), whole(call, expected, [num_rows]))
    close(left, state)
    after_pieces = [*range(PIECE, num_rows, PIECE), num_rows]
    outputs, left = run(call, after_pieces)
    assert torch.equal(whole(call, outputs, after_pieces), whole(call, expected, [num_rows]))
    assert torch.equal(left, state)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8)
@given(data=st.data())
def test_rows_among_neighbours_have_the_bits_that_they_have_alone(
    kind: Kind, dtype: torch.dtype, data: st.DataObject
) -> None:
    num_rows, before, after = data.draw(st.tuples(st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)))
    total = before + num_rows + after
    packed = kind(total, Random(total, dtype))
    mine = slice(before, before + num_rows)
    among = packed.bound().cut(mine)
    alone = among.kept()
    form = data.draw(st.sampled_from(["chunk", "step"] if num_rows == 1 else ["chunk"]))
    lefts = room(among), room(alone)
    outputs = [getattr(call, form)(None, left) for call, left in zip((among, alone), lefts, strict=True)]
    assert torch.equal(*outputs)
    assert torch.equal(*lefts)
    joined = packed.bound().joined(outputs[:1], [mine])
    joined = joined[0] if isinstance(joined, tuple) else joined
    earlier, found, later = joined.split((before, num_rows, after), packed.rows_at)
    assert torch.equal(found, outputs[0])
    assert not earlier.any()
    assert not later.any()


@every_kind
@pytest.mark.parametrize(("form", "num_rows"), [("chunk", 70), ("step", 1)])
def test_the_state_before_is_left_alone_unless_it_is_the_one_after(kind: Kind, form: str, num_rows: int) -> None:
    call = kind(num_rows, Random(3, torch.float32)).bound()
    _, state = run(kind(40, Random(4, torch.float32)).bound(), [40])
    before = state.clone()
    left = room(call)
    expected = getattr(call, form)(state, left)
    assert torch.equal(state, before)
    found = getattr(call, form)(state, state)
    assert torch.equal(found, expected)
    assert torch.equal(state, left)


@pytest.mark.parametrize("kind", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize(("form", "num_rows"), [("chunk", 13), ("step", 1)])
def test_bits_are_those_of_any_number_of_threads_steadied_or_not(kind: Kind, form: str, num_rows: int) -> None:
    call = kind(num_rows, Random(5, torch.bfloat16)).bound()
    _, state = run(kind(20, Random(6, torch.bfloat16)).bound(), [20])
    expected, left = room(call), room(call)
    output = getattr(call, form)(state, expected)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            with elementwise.steady() if num_threads > 1 else nullcontext():
                assert torch.equal(getattr(call, form)(state, left), output)
            assert torch.equal(left, expected)
    finally:
        torch.set_num_threads(before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_sequences_step_at_once(kind: Kind, dtype: torch.dtype) -> None:
    """Each from its own state, as it would alone; with the bits that it has in any place, whoever the others are."""
    given = kind(8, Random(9, dtype))
    call = given.bound()
    states = torch.stack([run(kind(20 + row, Random(row, dtype)).bound(), [20 + row])[1] for row in range(8)])
    left = torch.full_like(states, float("nan"))
    output = call.steps(states, left)
    outputs = output.split(1, given.rows_at)
    for row in range(8):
        after = room(call)
        close(outputs[row], call.cut(slice(row, row + 1)).step(states[row], after))
        close(left[row], after)
    order = torch.tensor([5, 0, 0, 7, 2, 1, 0, 3])
    others = states[order]
    found = call.cut(order).steps(others, others)
    assert torch.equal(others, left[order]), "in place"
    assert torch.equal(found, output.index_select(given.rows_at, order))
    whole = call.joined([found], [torch.tensor([6, 1])])
    placed = (whole[0] if isinstance(whole, tuple) else whole).split(1, given.rows_at)
    assert torch.equal(placed[6], outputs[5])
    assert torch.equal(placed[1], outputs[0])
    assert not any(placed[row].any() for row in (0, 2, 3, 4, 5, 7))


@every_kind
def test_what_is_kept_outlives_what_it_was_made_of(kind: Kind) -> None:
    args = kind(3, Random(7, torch.float32))
    call = args.bound()
    kept = call.cut(slice(1, 2)).kept()
    _, state = run(call, [3])
    left, again = room(call), room(call)
    output = call.cut(slice(1, 2)).step(state, left)
    args.mapped(lambda tensor: tensor.fill_(float("nan")))
    assert torch.equal(kept.step(state, again), output)
    assert torch.equal(again, left)


@pytest.mark.parametrize("kind", WIDE.values(), ids=WIDE)
def test_what_is_kept_takes_less_than_a_state(kind: Kind) -> None:
    """Else states after guesses would be kept instead. What does not belong to rows is there once for all of them."""
    call = kind(2, Random(7, torch.float32)).bound()
    first, second = (call.cut(slice(at, at + 1)).kept() for at in range(2))
    others = {tensor.data_ptr() for tensor in tensors_of(second)}
    assert sum(tensor.nbytes for tensor in tensors_of(first) if tensor.data_ptr() not in others) < call.part.num_bytes


@every_kind
@pytest.mark.parametrize("num_rows", [1, 9])
def test_shapes_are_found_without_numbers(kind: Kind, num_rows: int) -> None:
    args = kind(num_rows, Random(8, torch.bfloat16))
    there = args.mapped(lambda tensor: tensor.to("meta")).bound()
    here = args.bound()
    assert there.part == here.part
    left = room(there).to("meta")
    outputs = [there.chunk(None, left)]
    assert outputs[0].is_meta
    expected = args.expected()[0]
    for found in (there.joined(outputs, [slice(0, num_rows)]), there.joined([], [])):
        tensor = found[0] if isinstance(found, tuple) else found
        assert tensor.shape == expected.shape
        assert tensor.dtype == expected.dtype
    step = there.cut(slice(0, 1)).step(left, left)
    assert step.shape == here.cut(slice(0, 1)).step(None, room(here)).shape


class Kernels:
    """A stand-in for flash-linear-attention: transformers' functions, which have its signatures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        rules = {
            "chunk_gated_delta_rule": qwen.torch_chunk_gated_delta_rule,
            "fused_recurrent_gated_delta_rule": qwen.torch_recurrent_gated_delta_rule,
        }
        channels = {
            "chunk_kda": kimi.chunk_kimi_delta_attention,
            "fused_recurrent_kda": kimi.recurrent_kimi_delta_attention,
        }
        for name, functions in (("fla.ops.gated_delta_rule", rules), ("fla.ops.kda", channels)):
            module = ModuleType(name)
            for function in functions:
                setattr(module, function, self._noted(function, functions[function]))
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(fused, "kernel", fused.kernel.__wrapped__)
        monkeypatch.setattr(fused, "takes", lambda key: True)

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            return function(*args, **kwargs)

        return run


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (delta_rule, ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]),
        (channel_decay, ["chunk_kda", "fused_recurrent_kda"]),
    ],
)
def test_kernels_are_given_what_torch_is(kind: Kind, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, step = kind(70, Random(9, torch.float32)).bound(), kind(1, Random(10, torch.float32)).bound()
    first, second, third = room(chunk), room(chunk), room(chunk)
    expected = [chunk.chunk(None, first), chunk.chunk(first, second), step.step(second, third)]
    kernels = Kernels(monkeypatch)
    states = room(chunk), room(chunk), room(chunk)
    found = [chunk.chunk(None, states[0]), chunk.chunk(states[0], states[1]), step.step(states[1], states[2])]
    assert kernels.called == [names[0], names[0], names[1]]
    for ours, theirs in zip([*expected, first, second, third], [*found, *states], strict=True):
        close(theirs, ours)


def test_kernels_are_not_called_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    assert not fused.takes(torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16))


def test_what_computes_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity() == f"torch {VERSION}"
    monkeypatch.setattr(fused, "version", lambda: "0.6.0")
    assert identity() == f"torch {VERSION}, flash-linear-attention 0.6.0"
