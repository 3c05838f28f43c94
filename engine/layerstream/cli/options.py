"""Options that several commands share, a set of them for each thing that they describe.

A set is a dataclass; a command takes one as a parameter, and :func:`with_options` makes the options of its fields::

    @with_options
    def ask(question: ..., engine: EngineOptions, sampling: SamplingOptions) -> None: ...

What was not given is ``None`` (a flag: False), so that a command's own default, or the model's, can take its place.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from layerstream.api.params import SamplingParams
from layerstream.core.formats import FORMATS
from layerstream.errors import ConfigurationError

if TYPE_CHECKING:
    from layerstream.engine import LayerStream
    from layerstream.setup.config import EngineConfig

ON_UNLESS_TOLD = frozenset({"cuda_graphs"})
ESCAPES = {"\\n": "\n", "\\t": "\t"}

Model: TypeAlias = Annotated[
    str, typer.Option(envvar="LAYERSTREAM_MODEL", help="A folder, a hub id, or 'demo' for the bundled reader.")
]


def _engine(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Engine")


def _sampling(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is made: an option for each argument of :class:`~layerstream.LayerStream`."""

    memory: Annotated[
        str | None, _engine("The budget where it computes, such as 3GiB; 10GiB,4GiB: of several devices.")
    ] = None
    host_memory: Annotated[str | None, _engine("Host memory behind an accelerator; what has a use if not given.")] = (
        None
    )
    host_compute: Annotated[str | None, _engine("Experts in host memory that the processor computes: auto, off.")] = (
        None
    )
    device: Annotated[str | None, _engine("auto, cpu, cuda, cuda:1, mps.")] = None
    device_map: Annotated[str | None, _engine("Layers on several CUDA devices: auto, balanced, sequential.")] = None
    dtype: Annotated[str | None, _engine("What to compute in: auto, bfloat16, float16, float32.")] = None
    attention: Annotated[str | None, _engine("auto, sdpa, flash_attn.")] = None
    cuda_graphs: Annotated[
        bool | None,
        _engine("Decode sweeps as CUDA graphs, where all is on one card; on.", "--cuda-graphs/--no-cuda-graphs"),
    ] = None
    quantization: Annotated[str | None, _engine(f"Convert the model, once, and stream that: {', '.join(FORMATS)}.")] = (
        None
    )
    draft_model: Annotated[str | None, _engine("A small model with the same tokenizer that guesses.")] = None
    speculation: Annotated[str | None, _engine("Whether guesses are verified: auto, off.")] = None
    kv_store: Annotated[str | None, _engine("The folder of the KV store, if not the default one.")] = None
    no_kv_store: Annotated[bool, _engine("Neither take nor leave KV on the disk.", "--no-kv-store")] = False
    max_context: Annotated[
        int | None, _engine("Tokens of prompt and answer together, if fewer than the model's.", "--context")
    ] = None
    chunk_tokens: Annotated[int | None, _engine("Prompt tokens that attend together: 32, 64, 128, 256, 512.")] = None
    reuse: Annotated[str | None, _engine("Which KV is used again: exact, or anywhere (passages are moved).")] = None
    recompute: Annotated[str | None, _engine("Of what is moved, what is computed again: free, or a share.")] = None
    recompute_by: Annotated[str | None, _engine("Which of it: first, deviation.")] = None
    revision: Annotated[str | None, _engine("Branch, tag or commit of a model on the hub.")] = None
    trust_remote_code: Annotated[bool, _engine("Run code that comes with the model.", "--trust-remote-code")] = False
    allow_untested: Annotated[bool, _engine("Try a family that is not on the tested list.", "--allow-untested")] = False
    allow_control_tokens: Annotated[
        bool, _engine("Let prompts and documents write the model's control tokens.", "--allow-control-tokens")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """What was given, as :class:`~layerstream.LayerStream` takes it.

        Raises:
            ConfigurationError: a store, and none.
        """
        given: dict[str, Any] = {
            name: value
            for name, value in _values(self)
            if value is not None and (value is not False or name in ON_UNLESS_TOLD)
        }
        if given.pop("no_kv_store", False):
            if "kv_store" in given:
                raise ConfigurationError("--kv-store and --no-kv-store exclude each other: leave out one of the two")
            given["kv_store"] = None
        if "memory" in given:
            given["memory"] = split(given["memory"])
        if "recompute" in given and given["recompute"] != "free":
            given["recompute"] = _share(given["recompute"])
        return given

    def open(self, model: str, **defaults: Any) -> LayerStream:
        """The engine, with *defaults* where nothing was given.

        Raises:
            LayerStreamError: it cannot be had.
        """
        from layerstream.engine import LayerStream

        return LayerStream(model, **{**defaults, **self.arguments()})

    def config(self, model: str) -> EngineConfig:
        """What :meth:`open` would make an engine from."""
        from layerstream.setup.config import as_config

        return as_config(model, **self.arguments())


def _share(text: str) -> float | str:
    """The number that *text* is; itself, for the engine to refuse, if it is none."""
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn and when they stop, as :class:`~layerstream.SamplingParams` has it."""

    max_tokens: Annotated[int | None, _sampling("Longest answer; what fits the speed if not given.")] = None
    temperature: Annotated[float | None, _sampling("0: the most probable token; 1: as the model says.")] = None
    top_p: Annotated[float | None, _sampling("The smallest set of tokens with this much probability.")] = None
    top_k: Annotated[int | None, _sampling("This many most probable tokens; 0: all.")] = None
    min_p: Annotated[float | None, _sampling("Tokens with this share of the best one's probability.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Of tokens of prompt and answer; 1: none.")] = None
    presence_penalty: Annotated[float | None, _sampling("Of tokens that the answer has already; 0: none.")] = None
    frequency_penalty: Annotated[float | None, _sampling("For each time that it has them; 0: none.")] = None
    seed: Annotated[int | None, _sampling("The same seed draws the same answer again.")] = None
    stop: Annotated[
        list[str] | None, _sampling("Text that ends the answer, \\n for a new line; may be given several times.")
    ] = None

    def params(self, **defaults: Any) -> SamplingParams:
        """The parameters, with *defaults* where nothing was given.

        Raises:
            InvalidSamplingParams: names the field and its range.
        """
        given = {name: value for name, value in _values(self) if value is not None}
        given["stop"] = [functools.reduce(_unescape, ESCAPES, text) for text in given.get("stop", ())]
        return SamplingParams(**{**defaults, **given})


OPTION_NAMES = {"max_context": "context"}
"""Fields whose option is called otherwise."""


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """*command* for typer: a parameter that is a set of options becomes those options."""
    parameters = inspect.signature(command, eval_str=True).parameters
    kinds: dict[str, Any] = {name: parameter.annotation for name, parameter in parameters.items()}
    sets: dict[str, Any] = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in sets.items()
        }
        return command(**given, **made)

    flat: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        flat.extend(_parameters(sets[name]) if name in sets else [parameter.replace(kind=parameter.KEYWORD_ONLY)])
    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def split(memory: str | None) -> str | list[str] | None:
    """A budget, or those of several devices, as ``LayerStream`` takes them."""
    return memory.split(",") if memory is not None and "," in memory else memory


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )


def _values(options: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(options, field.name)) for field in dataclasses.fields(options))


def _unescape(text: str, escape: str) -> str:
    return text.replace(escape, ESCAPES[escape])
