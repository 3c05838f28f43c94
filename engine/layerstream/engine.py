"""The one object users hold: :class:`LayerStream`.

What it can be asked is in the classes that it inherits from, a file for each below ``front/``:

| what | where |
|---|---|
| ``generate``, ``stream``, ``submit``, ``submit_many``, ``gang`` | ``asking.py`` |
| ``embed``, ``score``, ``submit_to_read`` | ``scoring.py`` |
| ``warm``, ``forecast_warm``, ``cached_tokens``, ``note_retrieved``, ``popularity`` | ``remembering.py`` |
| ``turn``, chat templates, ``encode``, ``encode_piece``, ``frame``, ``tokenizer`` | ``phrasing.py`` |
| ``plan``, ``identity``, ``model_name``, ``context_length``, ``sampling_defaults``, ``trust_reuse`` | ``opened.py`` |
| what it is opened with, ``stats``, ``record``, ``close`` | here |
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from layerstream.api.events import Listener
from layerstream.checkpoint.hub import DEMO, bundled_reader
from layerstream.core.sizes import format_size
from layerstream.front.asking import Asking
from layerstream.front.remembering import Remembering
from layerstream.front.scoring import Scoring
from layerstream.hardware.timeline import Timeline
from layerstream.progress import make_listener
from layerstream.setup.config import MAX_QUEUED, as_config
from layerstream.stats import EngineStats, collect_stats
from layerstream.store.config import KVStoreConfig

logger = logging.getLogger(__name__)


class LayerStream(Asking, Scoring, Remembering):
    """A language model whose weights stream past the compute within a memory budget.

    Args:
        model: a folder, a hub id, or ``"demo"`` for the bundled reader.
        device: ``"auto"`` (a CUDA device where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        device_map: spread the layers over all CUDA devices: ``"balanced"`` (a range of layers for each, in proportion
            to its memory), ``"sequential"`` (as many as stay on the first, then the second; the last one streams what
            is left), ``"auto"`` (balanced where everything stays; where weights stream, devices take turns, so that
            they cross all links at once). ``None``: one device.
        memory: ceiling for all that the engine allocates where it computes (``"3GiB"`` or bytes; with ``device_map``
            on each device, or a list with one for each); ``None``: what the model wants, within what the machine, or
            the device, has free.
        host_memory: on an accelerator, ceiling for weights and KV in host memory, which is pinned; what fits neither
            here nor there is read from disk for every sweep. ``None``: what has a use, within what is free.
        host_compute: of a mixture of experts on an accelerator, ``"auto"``: the processor computes experts that are in
            host memory where that is done sooner than they cross to the accelerator; ``"off"``: none, so that answers
            have the same bits whatever is where.
        dtype: ``"auto"`` (as the checkpoint was saved), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        attention: ``"auto"``, ``"sdpa"`` (torch's), or ``"flash_attn"`` (that package's, on an accelerator, for what
            attends span by span there: soft caps, latents).
        cuda_graphs: on a CUDA device that has room for the whole model, launch a decode sweep at once; which changes no
            bit. ``False``: operator by operator.
        quantization: ``"nf4"``, ``"int8"`` or ``"int4"``: convert the model once, into the user's cache folder, and
            stream that: a quarter, a half, a quarter of the bytes. (What comes quantised needs nothing of the kind.)
        speculation: ``"auto"``: guesses at what comes next are verified in the sweeps, which changes no answer and
            takes fewer of them; ``"off"``: one token per sweep.
        draft_model: a smaller model with the same tokenizer (folder or hub id) that stays in memory and guesses too.
        kv_store: where the KV of prompts outlives the process: ``"auto"`` (the user's cache folder), a folder, a
            :class:`KVStoreConfig`, or ``None`` for nowhere.
        max_context: tokens per sequence at most, if fewer than the model's own limit.
        chunk_tokens: prompt tokens that attend together (32 by default); prefixes are shared finer, see
            ``plan.page_tokens``.
        reuse: ``"exact"``: KV is used again where it is what computing would give; ``"anywhere"``: also that of
            passages which stand elsewhere in the prompt, moved there and in part computed again (docs/kv-store.md).
        recompute: with ``reuse="anywhere"``, how much of a passage is computed again: a share, or ``"free"``: what a
            sweep computes anyway while it reads.
        recompute_by: ``"first"``: of each passage the first tokens; ``"deviation"``: those whose keys differ most in an
            early layer, up to which all of them are computed.
        max_queued: answers that may wait for their turn; past it, :class:`QueueFull`. ``None``: any number.
        allow_untested: try a family that is not on the tested list, after a self-check.
        allow_control_tokens: let control tokens in what messages say (``"<|im_end|>"`` in a retrieved document) be
            those of the chat template. By default they are ordinary text: what is retrieved cannot give orders.
        progress: ``"auto"`` (a line on a terminal or in a notebook once an answer takes longer than two seconds),
            a bool, or a function that is called with :mod:`layerstream.api.events`.

    Raises:
        UnsupportedModel, CheckpointError, ConfigurationError: before a weight is read.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str = "auto",
        device_map: str | None = None,
        memory: int | str | Seq[int | str] | None = None,
        host_memory: int | str | None = None,
        host_compute: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        cuda_graphs: bool = True,
        quantization: str | None = None,
        kv_store: str | Path | KVStoreConfig | None = "auto",
        speculation: str = "auto",
        draft_model: str | Path | None = None,
        max_context: int | None = None,
        chunk_tokens: int | None = None,
        reuse: str = "exact",
        recompute: str | float = "free",
        recompute_by: str = "first",
        max_queued: int | None = MAX_QUEUED,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | None = None,
        allow_untested: bool = False,
        allow_control_tokens: bool = False,
        progress: Literal["auto"] | bool | Listener = "auto",
    ) -> None:
        config = as_config(
            model,
            device=device,
            device_map=device_map,
            memory=memory,
            host_memory=host_memory,
            host_compute=host_compute,
            dtype=dtype,
            attention=attention,
            cuda_graphs=cuda_graphs,
            quantization=quantization,
            kv_store=kv_store,
            speculation=speculation,
            draft_model=draft_model,
            max_context=max_context,
            chunk_tokens=chunk_tokens,
            reuse=reuse,
            recompute=recompute,
            recompute_by=recompute_by,
            max_queued=max_queued,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            allow_untested=allow_untested,
            allow_control_tokens=allow_control_tokens,
        )
        super().__init__(config, make_listener(progress))
        logger.info("%s: %s", self.model_name, self._parts.defaults.describe())
        if self.model_name == DEMO:
            _say_that_a_toy_answers()

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        self._home.check()
        return collect_stats(self._parts, self._loop.counters, self._loop.clients, self._guard)

    @contextmanager
    def record(self) -> Iterator[Timeline]:
        """Within it, the timeline is told what goes on: reads, copies, waits and compute, unit by unit::

        with engine.record() as timeline:
            engine.generate(prompt, params)
        timeline.write_chrome("trace.json")  # for ui.perfetto.dev
        """
        self._home.check()
        timeline = Timeline()
        self._parts.record(timeline)
        try:
            yield timeline
        finally:
            self._parts.record(None)

    def close(self) -> None:
        """Stop by the next unit; what still runs fails with :class:`EngineClosed`. Never raises, ends every thread of
        the engine. Idempotent, from any thread; from a callback it takes effect when the callback has returned."""
        with self._without_warming():
            self._loop.close()

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LayerStream({self.model_name!r}, {'streaming' if self.plan.streams else 'resident'})"


@functools.cache
def _say_that_a_toy_answers() -> None:
    """Once in a process; whoever named no model may take it for more."""
    size = sum(path.stat().st_size for path in bundled_reader().glob("*.safetensors"))
    logger.warning(
        "the bundled %s toy answers: it finds short answers in a text of the prompt and knows nothing else; name a "
        "model for more (model=, or LAYERSTREAM_MODEL)",
        format_size(size),
    )
