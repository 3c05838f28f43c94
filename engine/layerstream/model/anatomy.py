"""Where the language model is in the model that a checkpoint is of.

A checkpoint is opened as the class that saved it: a causal model, or one that reads images or sound beside text. Of the
latter the language model, its head and what the class makes of logits are kept; what turns images and sound into
embeddings (its towers) is left out. So names, conversions and what happens to logits are those of the whole model.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from layerstream.errors import UnsupportedModel
from layerstream.model.meta import no_weights

_CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
)

_BUILDING = threading.Lock()  # what a model is built with is replaced meanwhile, for all threads


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a *model* that text goes through.

    Attributes:
        model: the whole, towers left out: its paths are the names of its weights.
        causal: the smallest part that has decoder and head; it decides what becomes of logits.
        trunk: the child of *causal* that has the decoder, or is it.
        decoder: the model below the head: embedding in, hidden states out.
        embedding: of tokens.
        layer_embedding: a second table, whose rows go to each layer (``per_layer_inputs``).
        head: the output projection.
    """

    model: Any
    causal: Any
    trunk: Any
    decoder: Any
    embedding: torch.nn.Embedding
    head: torch.nn.Linear
    layer_embedding: torch.nn.Embedding | None = None

    @property
    def cache_name(self) -> str:
        """What the decoder's forward calls its cache."""
        names = inspect.signature(type(self.decoder).forward).parameters
        return "cache_params" if "cache_params" in names else "past_key_values"


def own_class(config: Any) -> Any:
    """The class that a checkpoint with *config* was saved by, as far as it generates text; ``None``: there is none.

    The checkpoint says it (``architectures``); else it is the first that transformers has for such a config.
    """
    found = [cls for mapping in _CLASSES for cls in _of(mapping, type(config))]
    said = getattr(config, "architectures", None) or ()
    return next((cls for cls in found if cls.__name__ in said), next(iter(found), None))


def build_own(config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model of *config* on the meta device, as the class that saved it; non-persistent buffers are real.

    Args:
        trust_remote_code: whether code that comes with the model may be its class.
        options: for transformers: ``dtype``, ``attn_implementation``, …

    Raises:
        UnsupportedModel: there is no class of it that generates text.
    """
    with _BUILDING, no_weights(), no_init_weights(), _lenient(config):
        return make_own(copy.deepcopy(config), trust_remote_code, **options).eval()


def make_own(config: Any, trust_remote_code: bool, **options: Any) -> Any:
    """A model of *config* with the weights that its class draws; otherwise as :func:`build_own`."""
    if trust_remote_code and hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, **options)
    own = own_class(config)
    if own is None:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} has no class of {config.model_type!r} that generates text: it is "
            "no language model"
        )
    return own._from_config(config, **options)


@contextmanager
def _lenient(config: Any) -> Iterator[None]:
    """A tower whose package is not installed (timm, for Gemma 3n) is left out at once."""
    if not getattr(config, "sub_configs", None):
        yield
        return
    auto: Any = transformers.AutoModel
    inherited = auto.from_config

    def from_config(config: Any, **options: Any) -> Any:
        try:
            return inherited(config, **options)
        except ImportError:
            return torch.nn.Module()

    auto.from_config = from_config
    try:
        yield
    finally:
        del auto.from_config


def dissect(model: Any) -> Anatomy:
    """Find the language model in *model*, and leave out what it does without.

    Raises:
        UnsupportedModel: there is no embedding or no linear head, or they are not where they are expected.
    """
    embedding = _embedding(model)
    names = {module: name for name, module in model.named_modules()}
    chain = _ancestors(model, names[embedding]) if isinstance(embedding, torch.nn.Embedding) else []
    head, causal = _head(model, chain)
    if not isinstance(head, torch.nn.Linear) or causal is None:
        raise UnsupportedModel(
            f"{model.config.model_type!r} has a {type(embedding).__name__} and a {type(head).__name__} where an "
            "embedding and a linear output projection are expected"
        )
    decoder = chain[-1]
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedModel(
            f"{model.config.model_type!r} has its embedding inside a {type(decoder).__name__}, which does "
            "more than to look up rows: this version cannot run it"
        )
    embedding.padding_idx = None  # rows are gathered first, so ids are positions in what was gathered
    _leave_out_towers(chain, {head, *_ancestors(model, names[head])})
    return Anatomy(model, causal, chain[chain.index(causal) + 1], decoder, embedding, head, _second_table(decoder))


def _embedding(model: Any) -> Any:
    """That of tokens; of a model of several (Qwen's Omni), the first that has one."""
    parts = (part for part in (model, *model.children()) if isinstance(part, PreTrainedModel))
    for part in parts:
        with suppress(NotImplementedError):
            return part.get_input_embeddings()
    return None


def _of(mapping: Any, kind: type) -> list[type]:
    if kind not in mapping:
        return []
    found = mapping[kind]
    return list(found) if isinstance(found, tuple | list) else [found]


def _ancestors(model: Any, path: str) -> list[Any]:
    """*model* and what is between it and the module at *path*."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _head(model: Any, chain: list[Any]) -> tuple[Any, Any]:
    """The output projection, and the innermost model that has it and the embedding, which *chain* leads to."""
    models = [part for part in chain[:-1] if isinstance(part, PreTrainedModel)]
    heads = [(head, part) for part in models if (head := part.get_output_embeddings()) is not None]
    head = heads[-1][0] if heads else None
    inside = [part for part in models if any(module is head for module in part.modules())]
    return head, inside[-1] if inside else None


def _leave_out_towers(chain: list[Any], kept: set[Any]) -> None:
    """Of all that is on the way to the decoder, only what leads there or to the head keeps its weights."""
    for part, following in itertools.pairwise(chain):
        for name, child in list(part.named_children()):
            if child is not following and child not in kept and _has_weights(child):
                setattr(part, name, None)
        for name in list(part._parameters):
            part._parameters[name] = None


def _has_weights(module: torch.nn.Module) -> bool:
    return bool(module.state_dict())


def _second_table(decoder: Any) -> torch.nn.Embedding | None:
    """The embedding whose rows *decoder* takes as ``per_layer_inputs``."""
    if "per_layer_inputs" not in inspect.signature(decoder.forward).parameters:
        return None
    table = getattr(decoder, "embed_tokens_per_layer", None)
    if table is not None:
        table.padding_idx = None
    return table


def body_modules(anatomy: Anatomy) -> Iterator[torch.nn.Module]:
    """What a sweep passes between embedding and head, in module order; lists of modules are opened."""
    for child in anatomy.decoder.children():
        if child is anatomy.embedding or child is anatomy.layer_embedding:
            continue
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield child
