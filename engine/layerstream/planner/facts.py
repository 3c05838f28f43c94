"""What a plan depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layerstream.kv.pages import LAYERS_IN_HAND
from layerstream.kv.shape import rows_at_once
from layerstream.planner.units import ExpertsNode, WeightNode, linears

PAGE_CHOICES = (8, 16, 32)  # tokens of a prompt that are shared together: few, for documents end anywhere
CHUNK_TOKENS = 32  # of a prompt, that attend together; a sequence may begin at any page of them
ALONE_CHUNK_TOKENS = 128  # where all stay and every chunk expands all latents before it: the fewer the better
DEVICE_CHUNK_TOKENS = 128  # on an accelerator; a page holds a chunk there
RESIDENT_ROWS = 8  # decode rows per row block where all stay: eight take a tenth longer than one; guesses fill them
DEVICE_ROWS = 128  # on an accelerator: it launches once for a block, and products of so many rows take little longer
STREAMING_ROWS = 32  # decode rows per row block, and of the head, where weights stream: compute is idle anyway
FAST_STREAMING_ROWS = 64  # where the processor multiplies in the compute dtype: 64 rows take half longer than 32
DECODING_STREAMING_ROWS = 16  # where weights are decoded as they pass: then it is the compute that is waited for
PROMPT_ROWS = 128  # rows per row block of prompts where weights stream; more, if a chunk has more
RESIDENT_PROMPT_ROWS = 64  # where they stay: 128 are as fast for a long prompt, and slower for a short question
DEVICE_PROMPT_ROWS = 512  # on an accelerator, which wants large products
MAX_SWEEP_TOKENS = 512
DEVICE_SWEEP_TOKENS = 4096  # an accelerator computes as many while a layer crosses the link
RECURRENT_CHUNK_TOKENS = 64  # transformers' scans pad chunks to as many, so smaller ones would compute padding
STATES_IN_HAND = 4  # copies of one layer's state: guesses and replays go on from the committed one
STEPPED_COPIES = 3  # of the states that a device steps at once: before, after, and of what they are multiplied by
FP32_BYTES = 4
SCAN_COPIES = 4  # in fp32 of what scans are given, while they compute: repeated for heads, cut into chunks, multiplied


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model, and how it would be computed with.

    Attributes:
        body: sizes of what every sweep passes, in module order.
        head: sizes of the output projection.
        routed_body: the same as *body*, without experts that may come as they are routed to.
        experts: sizes of those; none: there are none, or they come with their block.
        expert_shares: how much each of them was used lately, but for a factor, in the order of *experts*.
        embedding_bytes: the embedding matrix in the compute dtype; 0 if it is the head's.
        layer_kv: KV of one token, by layer; 0: the layer reads what another one keeps, or keeps no KV.
        layer_state: the state of one sequence, by layer; 0: the layer keeps none. Empty: no layer does.
        layer_state_row: what is kept of a guessed row until it is accepted, by layer: the inputs of its scans.
        hidden_size, intermediate_size, vocab_size: widths that activations have.
        itemsize: bytes of one value in the compute dtype.
        context_length: tokens a sequence may have.
        wanted_context: as many as were asked for, where those are more.
        attended_kv_bytes: KV of one token in the layer that most is attended to in, wherever it is kept.
        hidden_copies: hidden states that are kept apart for a row.
        lasting_kv_bytes: KV of one token in layers that later ones attend to as well.
        layer_row_bytes: what a row is given for all layers beside its embedding, as it is stored and as it is computed
            with.
        can_spill: whether there is a store that KV of long prompts can stream from.
        chunk_tokens: prompt tokens that attend together.
        streaming_chunk_tokens: as many where weights stream.
        page_tokens: tokens of a page; 0: as many as a chunk.
        streaming_rows: decode rows per row block where weights stream.
        resident_rows: as many where they stay.
        prompt_rows: rows per row block of prompts where weights stream.
        resident_prompt_rows: as many where they stay; 0: every chunk is a row block of its own size.
        sweep_tokens: known tokens in a sweep at most.
        fused_rows: for each kernel that multiplies by quantised weights as they are, the most rows that it does it for.
        host_fused_rows: the same for the processor beside an accelerator, where it may compute experts; ``None``: it
            may not.
        num_values: weights that a sweep passes, as numbers.
        is_on_device: computed by an accelerator with memory of its own. KV then has its place on the host.
        kv_rides: on the device there is the KV of the layers in hand only; else all of it as well.
        kv_tokens: tokens that there is room for KV of, wherever it has its place, at most.
        workspace_bytes: what the libraries that compute take.
        is_cut: single Linears stream, so that what they give is there for all rows of a sweep; else row blocks pass
            attention and MLP one by one.
        mtp: of the multi-token-prediction head, a model of its own; ``None``: there is none, or it does not draft.
    """

    body: tuple[WeightNode, ...]
    head: WeightNode
    embedding_bytes: int
    layer_kv: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    itemsize: int
    context_length: int
    chunk_tokens: int = CHUNK_TOKENS
    streaming_chunk_tokens: int = CHUNK_TOKENS
    page_tokens: int = 0
    streaming_rows: int = STREAMING_ROWS
    resident_rows: int = RESIDENT_ROWS
    prompt_rows: int = PROMPT_ROWS
    resident_prompt_rows: int = RESIDENT_PROMPT_ROWS
    sweep_tokens: int = MAX_SWEEP_TOKENS
    fused_rows: Mapping[str, int] = field(default_factory=dict[str, int])
    host_fused_rows: Mapping[str, int] | None = None
    num_values: int = 0
    attended_kv_bytes: int = 0
    hidden_copies: int = 1
    lasting_kv_bytes: int = 0
    layer_row_bytes: int = 0
    can_spill: bool = False
    is_on_device: bool = False
    kv_rides: bool = False
    kv_tokens: int = 2**62
    workspace_bytes: int = 0
    is_cut: bool = False
    routed_body: tuple[WeightNode, ...] = ()
    experts: tuple[ExpertsNode, ...] = ()
    expert_shares: tuple[float, ...] = ()
    wanted_context: int = 0
    mtp: ModelFacts | None = None
    layer_state: tuple[int, ...] = ()
    layer_state_row: tuple[int, ...] = ()

    @property
    def streamed_body(self) -> tuple[WeightNode, ...]:
        """What units are made of where weights stream."""
        return self.routed_body if self.experts else self.body

    @property
    def num_experts(self) -> int:
        """Experts of all layers."""
        return sum(node.num_experts for node in self.experts)

    @property
    def mean_expert_bytes(self) -> float:
        """One expert as it is stored; 0.0 if there are none."""
        total = sum(node.num_experts * node.expert_bytes for node in self.experts)
        return total / self.num_experts if self.experts else 0.0

    @property
    def slot_bytes_of_expert(self) -> int:
        """Room for any expert."""
        return max((node.slot_bytes for node in self.experts), default=0)

    @property
    def expert_scratch_bytes(self) -> int:
        """What computing with any expert takes beside it."""
        return max((node.scratch_bytes for node in self.experts), default=0)

    @property
    def decode_bytes(self) -> int:
        """What decoding a quantised matrix takes at most."""
        return max(node.most_decode_bytes for node in (*self.body, self.head))

    @property
    def stored_bytes(self) -> int:
        """Weights that a sweep passes, on disk."""
        return sum(node.total_bytes for node in (*self.body, self.head))

    @property
    def without_kernel(self) -> dict[str, WeightNode]:
        """Quantised Linears that nothing multiplies by undecoded, by name."""
        nodes = [node for root in (*self.body, self.head) for node in linears(root)]
        return {node.name: node for node in nodes if not self.fused_rows.get(node.kernel)}

    @property
    def compute_bytes(self) -> int:
        """All weights as they are when they are resident: in the compute dtype, or quantised."""
        return sum(node.total_compute_bytes for node in (*self.body, self.head)) + self.embedding_bytes

    @property
    def num_layers(self) -> int:
        """Layers, whether they keep KV or not."""
        return len(self.layer_kv)

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token over all layers."""
        return sum(self.layer_kv)

    @property
    def state_bytes(self) -> int:
        """One slot: the states of all recurrent layers of one sequence; 0: there are no such layers."""
        return sum(self.layer_state)

    @property
    def state_row_bytes(self) -> int:
        """What is kept of a guessed row until it is accepted, over all recurrent layers."""
        return sum(self.layer_state_row)

    @property
    def state_scratch_bytes(self) -> int:
        """Copies of one layer's state while it is computed with; on a device those of many rows at once, and the slot
        of nobody."""
        state = max(self.layer_state, default=0)
        if not self.is_on_device or not state:
            return STATES_IN_HAND * state
        at_once = rows_at_once(state, max(self.streaming_rows, self.resident_rows))
        return (STATES_IN_HAND + STEPPED_COPIES * at_once) * state + self.state_bytes

    @property
    def scanned_row_bytes(self) -> int:
        """What a recurrent layer's scans are given and give for a row."""
        return 2 * max(self.layer_state_row, default=0)

    @property
    def scan_row_bytes(self) -> int:
        """What scanning a row of a chunk takes beside that."""
        return SCAN_COPIES * max(self.layer_state_row, default=0) * FP32_BYTES // self.itemsize

    @property
    def layer_kv_bytes(self) -> int:
        """KV of one token in the layer that keeps most."""
        return max(self.layer_kv, default=0)

    @property
    def in_hand_bytes(self) -> int:
        """KV of one token in the layers in hand, and in those that stay in hand."""
        return min(self.kv_token_bytes, LAYERS_IN_HAND * self.layer_kv_bytes + self.lasting_kv_bytes)

    @property
    def shared_tokens(self) -> int:
        """Tokens of a page: those that are shared together."""
        return self.page_tokens or self.chunk_tokens

    @property
    def slot_bytes(self) -> int:
        """KV of a page of the layers in hand."""
        return self.shared_tokens * self.in_hand_bytes

    @property
    def kv_place_bytes(self) -> int:
        """What KV of one token takes where it is computed with."""
        return self.in_hand_bytes if self.kv_rides else self.kv_token_bytes

    @property
    def attending_bytes(self) -> int:
        """What a token that is attended to takes while it is: on an accelerator, its keys and values in one layer,
        gathered, and its column of a chunk's mask, as it is and as a kernel has it."""
        attended = max(self.layer_kv_bytes, self.attended_kv_bytes)
        return attended + self.chunk_tokens * (1 + self.itemsize) if self.is_on_device and attended else 0

    @property
    def kv_cost_bytes(self) -> int:
        """What room for KV of one token takes in all."""
        return self.kv_place_bytes + self.attending_bytes
