"""The model without its weights: transformers' modules on the meta device, and where their weights lie."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from layerstream.checkpoint.config import check_config
from layerstream.checkpoint.folder import CONFIG, MAX_CONFIG_BYTES, Checkpoint, open_folder
from layerstream.checkpoint.gguf import GgufFile, open_gguf
from layerstream.checkpoint.gguf_config import read_gguf_config
from layerstream.checkpoint.gguf_names import resolve_gguf
from layerstream.checkpoint.names import DTYPES, PackedSource, Source, resolve_parameters, transposed_names
from layerstream.checkpoint.reading import explained, read_object
from layerstream.errors import ConfigurationError, UnsupportedModel
from layerstream.model import attention, elementwise, experts
from layerstream.model.anatomy import Anatomy, body_modules, build_own, dissect
from layerstream.model.families import check_supported, check_tested, families_of
from layerstream.model.linear import TILE_VALUES
from layerstream.model.module_sizes import Weigher, is_fused_experts
from layerstream.model.trace import bypassing, trace
from layerstream.model.traced import Trace
from layerstream.planner.units import ExpertsNode, WeightNode, linears

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Skeleton:
    """A causal language model on the meta device.

    Attributes:
        anatomy: its parts; parameters are meta tensors, non-persistent buffers are real.
        config: the language model's.
        trace: what it caches, attends to and sees, by layer.
        sources: where the bytes of every parameter and persistent buffer lie, by state dict name.
        dtypes: the dtype that each of them is computed in.
        body: sizes of what every sweep passes, in module order: decoder layers, then the final norm.
        routed_body: the same without experts that may come as they are routed to, which are in *routed*.
        head: sizes of the output projection.
        model_bytes: bytes of all distinct weights on disk.
        tile_values: of a quantised matrix, decoded at a time.
        mtp: the head that predicts several tokens, as a model of one layer; ``None``: there is none, or nobody asked.
    """

    anatomy: Anatomy
    config: Any
    trace: Trace
    dtype: torch.dtype
    sources: Mapping[str, Source]
    dtypes: Mapping[str, torch.dtype]
    body: tuple[WeightNode, ...]
    routed_body: tuple[WeightNode, ...]
    routed: tuple[ExpertsNode, ...]
    head: WeightNode
    model_bytes: int
    tile_values: int = TILE_VALUES
    mtp: Skeleton | None = None

    @property
    def model(self) -> Any:
        """The whole, whose paths are the names of weights."""
        return self.anatomy.model

    @property
    def decoder(self) -> Any:
        """The model below the head."""
        return self.anatomy.decoder

    @property
    def embedding_key(self) -> str:
        """State dict name of the embedding matrix."""
        return f"{self.path_of(self.anatomy.embedding)}.weight"

    @property
    def layer_embedding_key(self) -> str | None:
        """State dict name of the matrix whose rows go to each layer; ``None``: there is none."""
        table = self.anatomy.layer_embedding
        return None if table is None else f"{self.path_of(table)}.weight"

    @property
    def head_key(self) -> str:
        """State dict name of the output projection's matrix."""
        return f"{self.head.name}.weight"

    @property
    def is_tied(self) -> bool:
        """Whether embedding and output projection are the same matrix."""
        return self.sources[self.head_key] is self.sources[self.embedding_key]

    @property
    def is_headless(self) -> bool:
        """Whether the checkpoint has no head: there are final hidden states, and logits mean nothing."""
        tied = self.model.all_tied_weights_keys
        return self.is_tied and self.head_key not in (*tied, *tied.values())

    @property
    def num_values(self) -> int:
        """Weights that a sweep passes, as numbers."""
        passed = (self.head.name, *(node.name for node in self.body))
        return sum(prod(self.sources[key].shape) for name in passed for key in self.keys_of(name))

    @property
    def kernels(self) -> set[str]:
        """Those that could multiply by its quantised Linears as they are, or rewritten; they compute in bfloat16."""
        if self.dtype != torch.bfloat16:
            return set()
        found = {node.kernel for root in (*self.body, self.head) for node in linears(root)}
        return (found | {node.kernel for node in self.routed}) - {""}

    def decodes(self, fused_rows: Mapping[str, int]) -> bool:
        """Whether quantised Linears are decoded as they stream, because none of *fused_rows* multiplies by them as they
        are stored."""
        packed = [source for source in self.sources.values() if isinstance(source, PackedSource)]
        return any(len(source.shape) == 2 and source.codec.kernel not in fused_rows for source in packed)

    def expert_keys(self, path: str) -> list[str]:
        """State dict names of what the module *path* has for each of its experts: ``(experts, …)``."""
        return [f"{path}.{name}" for name in experts.weight_names(self.model.get_submodule(path))]

    def path_of(self, module: torch.nn.Module) -> str:
        """Path of *module* within the causal model."""
        return next(name for name, other in self.model.named_modules() if other is module)

    def keys_of(self, path: str, *, own_only: bool = False) -> set[str]:
        """State dict names of the weights at and below *path*, or of those it owns itself: those of parts that never
        run are its own."""
        prefix = f"{path}."
        below = {key for key in self.sources if key.startswith(prefix)}
        if not own_only:
            return below
        own = {path, *(part for part in self.trace.idle if part.rpartition(".")[0] == path)}
        return {key for key in below if key.rpartition(".")[0] in own}


def build_skeleton(
    folder: Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_untested: bool = False,
    tile_values: int = TILE_VALUES,
) -> Skeleton:
    """Build the model of *folder* without reading a weight.

    Raises:
        UnsupportedModel: the family cannot run, with the reason.
        CheckpointError: the files are missing, damaged or of an unknown kind.
    """
    file = open_gguf(folder) if folder.suffix == ".gguf" else None
    checkpoint = None if file else open_folder(folder)
    if file is not None:
        config = read_gguf_config(file)
    else:
        assert checkpoint is not None
        check_config(checkpoint.config, str(folder / CONFIG), _shapes(checkpoint))
        config = load_config(folder, trust_remote_code=trust_remote_code)
    check_supported(config)
    if dtype == "auto":
        dtype = _stored_dtype(file or checkpoint, config, config.get_text_config(decoder=True))
    compute_dtype = resolve_dtype(dtype)
    with explained(f"{folder}: no model can be built as its config says"):
        anatomy = dissect(build_meta(config, compute_dtype, trust_remote_code))
    model = anatomy.model
    traced = trace(anatomy)
    if not allow_untested:  # what cannot run was refused for that
        check_tested(config)
    adapt(anatomy, traced)
    if file is not None:
        sources = resolve_gguf(model, file)
    else:
        assert checkpoint is not None
        sources = resolve_stored(model, checkpoint)
    return complete(anatomy, traced, sources, compute_dtype, _text_config(config, anatomy), tile_values)


def complete(
    anatomy: Anatomy,
    traced: Trace,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    config: Any,
    tile_values: int,
) -> Skeleton:
    """The skeleton of a model that is built, traced and adapted, with its weights at *sources*."""
    dtypes = _compute_dtypes(anatomy.model, sources, dtype)
    body, routed_body, routed, head = _weigh(anatomy, traced, sources, dtypes, tile_values)
    return Skeleton(
        anatomy=anatomy,
        config=config,
        trace=traced,
        dtype=dtype,
        sources=sources,
        dtypes=dtypes,
        body=body,
        routed_body=routed_body,
        routed=routed,
        head=head,
        model_bytes=sum({id(source): source.num_bytes for source in sources.values()}.values()),
        tile_values=tile_values,
    )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a model's folder.

    Raises:
        UnsupportedModel: transformers does not know its family.
        CheckpointError: it cannot be read, or transformers refuses what it says.
    """
    said = read_object(folder / CONFIG, MAX_CONFIG_BYTES)
    family = said.get("model_type")
    is_remote = trust_remote_code and isinstance(said.get("auto_map"), dict)
    if isinstance(family, str) and family not in transformers.CONFIG_MAPPING and not is_remote:
        code = "; it brings code of its own, which trust_remote_code=True allows to run" if "auto_map" in said else ""
        raise UnsupportedModel(
            f"{folder}: model_type is {family!r:.80}, which transformers {transformers.__version__} does not know{code}"
        )
    with explained(f"{folder / CONFIG}: transformers refuses what it says"):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _shapes(checkpoint: Checkpoint) -> Collection[tuple[int, ...]]:
    packed = [entry for matrix in checkpoint.packed.values() for entry in matrix.planes.values()]
    return [entry.shape for entry in (*checkpoint.tensors.values(), *packed)]


def resolve_dtype(dtype: str) -> torch.dtype:
    """The torch dtype meant by *dtype*."""
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[dtype]


def _stored_dtype(file: GgufFile | Checkpoint | None, *configs: Any) -> str:
    """What a checkpoint was saved in: as the first of *configs* says that has a word for it, else as most of its
    weights are stored."""
    if isinstance(file, GgufFile):
        return file.dtype
    said = [str(getattr(config, "dtype", None)).removeprefix("torch.") for config in configs]
    known = next((name for name in said if name in _DTYPES), None)
    return known or ("float32" if file is None else _most_stored(file))


def _most_stored(checkpoint: Checkpoint) -> str:
    """The dtype of most numbers among the tensors that are not quantised."""
    values: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        name = str(DTYPES.get(entry.dtype)).removeprefix("torch.")
        if name in _DTYPES:
            values[name] += prod(entry.shape)
    return max(values, key=lambda name: values[name], default="float32")


def _text_config(config: Any, anatomy: Anatomy) -> Any:
    """That of the language model of *anatomy*, with the last word of the whole's *config* where it has one."""
    text = anatomy.decoder.config
    if text.model_type != config.model_type:
        logger.info("%s is multimodal: its language model %s runs alone", config.model_type, text.model_type)
    text = copy.deepcopy(text)
    if (ends := getattr(config, "eos_token_id", None)) is not None:  # as transformers' generate
        text.eos_token_id = ends
    return text


def build_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of *config* on the meta device, attending as this engine does."""
    attention.register()
    experts.register()
    try:
        return build_own(
            config, trust_remote_code=trust_remote_code, dtype=dtype, attn_implementation=attention.IMPLEMENTATION
        )
    except KeyError as error:
        if error.args != (attention.IMPLEMENTATION,):
            raise
        raise bypassing(config.model_type) from error  # it has a class for each implementation that it knows


def adapt(anatomy: Anatomy, traced: Trace) -> None:
    """Have the modules of *anatomy* compute as this engine does."""
    for row in families_of(anatomy.model.config):
        if row.adapt is not None:
            row.adapt(anatomy.decoder)
    elementwise.install(
        anatomy.decoder, [anatomy.model.get_submodule(path) for path in sorted(traced.mingled | traced.mixers)]
    )
    for module in anatomy.decoder.modules():
        if is_fused_experts(module):
            module.config._experts_implementation_internal = experts.IMPLEMENTATION


def resolve_stored(model: Any, checkpoint: Checkpoint) -> dict[str, Source]:
    """Where in *checkpoint* the weights of *model* lie; raises as :func:`resolve_parameters`."""
    _turn_experts(model, checkpoint)
    return resolve_parameters(model, checkpoint.tensors, checkpoint.packed, _stand_ins(model, checkpoint))


def _stand_ins(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """What stands in for parameters that *checkpoint* may be without: where it was saved as a model without a head, the
    embedding for the head, which then is not to be asked (:attr:`Skeleton.is_headless`)."""
    if any(key.startswith(f"{model.base_model_prefix}.") for key in (*checkpoint.tensors, *checkpoint.packed)):
        return {}
    names = {module: name for name, module in model.named_modules()}
    with suppress(NotImplementedError):  # a whole of several models
        head, embedding = names.get(model.get_output_embeddings()), names.get(model.get_input_embeddings())
        return {f"{head}.weight": f"{embedding}.weight"} if head and embedding else {}
    return {}


def _turn_experts(model: Any, checkpoint: Checkpoint) -> None:
    """Have experts whose matrices transformers would transpose as it loads take them as they lie."""
    turned = set(transposed_names(model, {name: entry.shape for name, entry in checkpoint.tensors.items()}))
    for path, module in model.named_modules() if turned else ():
        if is_fused_experts(module) and turned >= {f"{path}.{name}" for name in experts.weight_names(module)}:
            experts.turn(module)


def _weigh(
    anatomy: Anatomy,
    traced: Trace,
    sources: Mapping[str, Source],
    dtypes: Mapping[str, torch.dtype],
    tile_values: int,
) -> tuple[tuple[WeightNode, ...], tuple[WeightNode, ...], tuple[ExpertsNode, ...], WeightNode]:
    """Sizes of the body, of the body without experts, of those experts, and of the head."""
    names = {module: name for name, module in anatomy.model.named_modules()}
    modules = sorted(
        ((module, names[module]) for module in body_modules(anatomy)),
        key=lambda found: traced.order.get(found[1], len(traced.order)),
    )

    def weigh(weigher: Weigher) -> tuple[WeightNode, ...]:
        nodes = (weigher.weigh(module, path) for module, path in modules)
        return tuple(replace(node, layer=traced.layer_at(node.name)) for node in nodes if node.total_bytes)

    without = Weigher(sources, dtypes, tile_values, traced, leaves_experts=True)
    routed_body = weigh(without)
    weigher = Weigher(sources, dtypes, tile_values, traced)
    body = weigh(weigher) if without.experts else routed_body
    return body, routed_body, tuple(without.experts), weigher.weigh(anatomy.head, names[anatomy.head])


def _compute_dtypes(model: Any, sources: Mapping[str, Source], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """As transformers loads them: everything in *dtype*, but what the family keeps in fp32, and what is no float."""
    patterns = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    keep = re.compile("|".join(rf"((^|\.){pattern}($|\.))" for pattern in sorted(patterns))) if patterns else None
    return {
        key: source.dtype
        if not isinstance(source, PackedSource) and not source.dtype.is_floating_point
        else torch.float32
        if dtype != torch.float32 and keep is not None and keep.search(key)
        else dtype
        for key, source in sources.items()
    }
