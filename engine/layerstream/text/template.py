"""A chat template: Jinja in a sandbox, within :mod:`~layerstream.text.bounds`, traced.

transformers' own environment has the same filters, functions and tags, so that a template means the same here; it has
neither bounds nor origins. Everything that makes a value passes through this environment: operators, calls, filters,
literals, slices and loops (:class:`_Generator` writes them so). A template that goes wrong, in whatever way, is a
:class:`~layerstream.errors.PromptError`. Any thread may render; a rendering's meter is its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from layerstream.errors import PromptError
from layerstream.text.bounds import (
    REFUSED_FILTERS,
    Meter,
    TemplateLimit,
    check_filter,
    check_method,
    check_operation,
)
from layerstream.text.traced import Traced, join, origin_of

SOURCE_LIMIT = 2**18  # characters; the longest templates in use have some 30,000

_meter: ContextVar[Meter] = ContextVar("layerstream_template_meter")


class ChatTemplate:
    """A chat template of *source*.

    Raises:
        PromptError: it cannot be read; :meth:`render`: it goes wrong, or wants more than it may have.
    """

    def __init__(self, source: str) -> None:
        if len(source) > SOURCE_LIMIT:
            raise _refused(f"it has {len(source):,} characters; expected {SOURCE_LIMIT:,} at most")
        with_meter = _meter.set(Meter())
        try:
            self._template = _environment().from_string(source)
        except Exception as error:
            raise _refused(error) from error
        finally:
            _meter.reset(with_meter)

    def render(self, variables: Mapping[str, Any]) -> Traced:
        """The text that the template writes, with the origin of each character."""
        with_meter = _meter.set(Meter())
        try:
            text = self._template.render(variables)
        except Exception as error:  # hostile input: it may raise whatever Python can
            raise _refused(error) from error
        finally:
            _meter.reset(with_meter)
        return Traced(text, origin_of(text))


def template_literals(source: str) -> str:
    """All that a template can write by itself, apart by null characters; nothing of one that cannot be read."""
    try:
        tree = _environment().parse(source)
    except (TemplateError, RecursionError, ValueError):  # whoever renders it is told
        return ""
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    found += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(found)


def _refused(reason: Exception | str) -> PromptError:
    if isinstance(reason, TemplateError | ValueError | TypeError | KeyError):
        return PromptError(f"the model's chat template refuses these messages: {reason}")
    found = reason if isinstance(reason, str | TemplateLimit) else f"{type(reason).__name__}: {reason}"
    return PromptError(
        f"the model's chat template cannot be used: {found!s:.300}; pass token ids or text, or correct the template "
        "(chat_template.jinja, or chat_template in tokenizer_config.json)"
    )


class _Generator(CodeGenerator):
    """Writes what makes values so that it passes through the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        steps = nodes.EnvironmentAttribute("steps")
        node.iter = nodes.Call(steps, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_If(self, node: nodes.If, frame: Frame) -> None:  # noqa: N802
        self.writeline("environment.take(None)")
        super().visit_If(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._taken(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._taken(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._taken(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._taken(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:  # noqa: N802
        raise TemplateSyntaxError("a chat template has no use for autoescape", node.lineno)

    def _taken(self, write: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.take(")
        write(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a meter."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_printed
        )
        self.globals.pop("lipsum")
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        jinja = ImmutableSandboxedEnvironment()
        jinja.filters.update(tojson=_to_json, join=_join)
        names = [name for name in jinja.filters if name not in REFUSED_FILTERS]
        self.filters = {name: _metered(name, jinja) for name in names}

    def concat(self, parts: Iterable[Any]) -> str:  # type: ignore[override]
        """*parts* as one text."""
        meter, texts, size = _meter.get(), [], 0
        for part in parts:
            texts.append(str(_printed(part)))
            size += len(texts[-1])
            meter.allow(size)
        return meter.take(join("", texts))

    def take(self, value: Any) -> Any:
        """*value*, which the template has just made."""
        return _meter.get().take(value)

    def steps(self, items: Iterable[Any]) -> Iterator[Any]:
        """*items* for a loop."""
        meter = _meter.get()
        for item in items:
            meter.step()
            yield item

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of a binary operation."""
        meter = _meter.get()
        check_operation(meter, operator, left, right)
        return _followed(meter, super().call_binop(context, operator, left, right), (left, right))

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """The result of a call."""
        meter = _meter.get()
        given = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        receiver = getattr(getattr(__function, "__wrapped__", __function), "__self__", None)
        meter.allow(sum(meter.weigh(value)[0] for value in (*args, *given.values())))
        check_method(meter, getattr(__function, "__name__", ""), receiver, args, given)
        with meter.call():
            result = super().call(__context, __function, *args, **kwargs)
        if isinstance(__function, Macro | BlockReference | LoopContext):
            return meter.take(result)  # what they write knows its origin
        if isinstance(receiver, list | tuple | dict):
            return result  # and so does what was there before
        return _followed(meter, result, (receiver, *args, *given.values()))


compile_template = lru_cache(maxsize=32)(ChatTemplate)
""":class:`ChatTemplate`, each source once."""


@lru_cache
def _environment() -> _Environment:
    return _Environment()


def _printed(value: Any) -> Any:
    """*value*, or its text, where that would not know that it was said."""
    return value if isinstance(value, str) or not _meter.get().holds_said((value,)) else Traced(str(value))


def _followed(meter: Meter, result: Any, sources: Iterable[Any]) -> Any:
    """*result*, said as a whole if something in *sources* was and it does not know better."""
    meter.take(result)
    if isinstance(result, str) and not isinstance(result, Traced) and meter.holds_said(sources):
        return Traced(result)
    return result


def _metered(name: str, jinja: ImmutableSandboxedEnvironment) -> Callable[..., Any]:
    """Jinja's filter *name*, within bounds. (One that asks for the context is not tried when a template compiles.)"""

    @pass_context
    def call(context: Context, value: Any = "", *args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        check_filter(meter, name, value, args, kwargs)
        with meter.call():
            result = jinja.call_filter(name, value, args, kwargs, context)
        return meter.take(result) if name in _CHOOSING else _followed(meter, result, (value, *args, *kwargs.values()))

    return call


_CHOOSING = frozenset({"attr", "d", "default", "first", "last", "max", "min"})
"""Filters that return one of the things that they are given."""


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    return join(d, value if attribute is None else map(make_attrgetter(environment, attribute), value))


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Dict:
    """``dict`` without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of any dict."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, without private attributes, and printed without those that it has."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class _GenerationTag(Extension):
    """``{% generation %}``: what is between is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag with what is in it."""
        number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(number)

    def _written(self, caller: Macro) -> str:
        return caller()
