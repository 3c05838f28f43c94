"""Tools that a model may call: their schemas, which of them may be called, and the calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from layerstream.errors import ToolError

ToolChoice: TypeAlias = str | bool | Mapping[str, Any] | None
"""``None`` or ``"auto"``: the model decides; ``"any"`` (``"required"``, ``True``): it must call one; ``"none"``
(``False``): it must not; a tool's name, alone or in OpenAI's ``{"type": "function", "function": {"name": ...}}``: that
one. Anthropic's ``{"type": "any"}`` and ``{"type": "tool", "name": ...}`` are understood."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask for; ``parameters`` is the JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Tool:
        """From OpenAI's form, ``{"type": "function", "function": {...}}``, or the inner part alone.

        Raises:
            ToolError: no name that can be called, or parameters that are no object's schema.
        """
        kind = given.get("type", "function") if isinstance(given, Mapping) else None
        if kind not in ("function", None):
            raise ToolError(
                f"a tool of type {kind!r} is a provider's own, and nobody runs it here; pass a function instead, as in "
                "{'type': 'function', 'function': {'name': 'search', ...}}"
            )
        function = given.get("function", given) if isinstance(given, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ToolError(
                f"a tool has a name of letters, digits, '_', '-' and '.', as in "
                f"{{'type': 'function', 'function': {{'name': 'search', ...}}}}; found {given!r:.120}"
            )
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ToolError(f"tool {name!r}: parameters are a JSON schema of an object, not {parameters!r:.120}")
        return cls(name, str(function.get("description") or ""), {"type": "object", "properties": {}, **parameters})

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form, which chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tools are offered, and what the answer must do about them; ``several``: there may be several calls."""

    offered: tuple[Tool, ...]
    mode: Literal["auto", "any", "none"]
    callable: tuple[Tool, ...]
    several: bool

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call."""
        return self.mode == "any"


def select_tools(
    given: Iterable[Mapping[str, Any]] | None, choice: ToolChoice, parallel: bool | None = None
) -> Selection:
    """What *choice* means for the tools that are there.

    Args:
        parallel: whether there may be several calls; ``None``: where the model decides to call, yes, and where it must,
            no.

    Raises:
        ToolError: a tool that is none, two of one name, or a choice of a tool that is not there.
    """
    tools = tuple(Tool.of(item) for item in given or ())
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ToolError(f"two tools are called {twice!r}; rename one")
    choice = _plain_choice(choice) if isinstance(choice, Mapping) else choice
    match choice:
        case None | "auto":
            return Selection(tools, "auto" if tools else "none", tools, parallel is not False)
        case False | "none":
            return Selection(tools, "none", (), False)
        case True | "any" | "required" if tools:
            return Selection(tools, "any", tools, parallel is True)
        case str() if choice in names:
            return Selection(tools, "any", tuple(tool for tool in tools if tool.name == choice), parallel is True)
        case _:
            there = ", ".join(names) or "no tools"
            raise ToolError(
                f"tool_choice is {choice!r}; expected 'auto', 'any', 'none' or the name of a tool (there: {there})"
            )


def _plain_choice(choice: Mapping[str, Any]) -> str:
    """What a mapping says: a tool's name (OpenAI's and Anthropic's forms), or ``{"type": "any"}`` and the like."""
    function, kind = choice.get("function", choice), choice.get("type")
    name = function.get("name") if isinstance(function, Mapping) else None
    said = kind if name is None and kind in ("auto", "any", "required", "none") else name
    if not isinstance(said, str):
        raise ToolError(
            "a tool_choice mapping is {'type': 'function', 'function': {'name': ...}} or {'type': 'any'}, not "
            f"{choice!r:.80}"
        )
    return said


def closed(schema: Any) -> Any:
    """*schema* with no properties but those it names, in it and below, unless it says otherwise.

    A model that fills in a form should not invent fields; pydantic would drop them, after they took their tokens.
    """
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {
        key: {name: closed(item) for name, item in value.items()}
        if key in _NAMED_SCHEMAS and isinstance(value, Mapping)
        else closed(value)
        if key in _SCHEMAS
        else value
        for key, value in schema.items()
    }
    if "properties" in result and not {"additionalProperties", "patternProperties", "allOf"} & result.keys():
        result["additionalProperties"] = False
    return result


_NAMED_SCHEMAS = frozenset({"properties", "$defs", "definitions"})
_SCHEMAS = frozenset({"items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties"})
