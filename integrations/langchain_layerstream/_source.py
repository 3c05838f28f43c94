"""What all wrappers have in common: the engine behind them, and on which terms it takes what they ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from langchain_core.runnables import RunnableConfig
from layerstream.handle import EngineHandle, check_fields, default_model, terms_of
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from langchain_layerstream._config import check_names, configured_terms
from langchain_layerstream.retrieved import watch_retrievers

if TYPE_CHECKING:
    from layerstream.engine import LayerStream


class EngineSource(BaseModel):
    """The engine, and the terms; loads at first use."""

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
    )

    model: str = Field(default_factory=default_model, alias="model_name")
    """Folder, hub id, ``.gguf`` file or ``"demo"``; by default what ``LAYERSTREAM_MODEL`` names, else the bundled
    reader."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """A :class:`layerstream.LayerStream` to share; ``model`` then follows from it."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the engine, such as ``{"memory": "3GiB"}``."""
    timeout: float | None = None
    """Seconds after which what is not finished is given up."""
    priority: int = 0
    """Where requests have to wait for each other, more goes first."""
    client: str = ""
    """Whom it is for; clients share the engine fairly."""
    tenant: str = ""
    """Whose it is: what one tenant's prompts left in memory and on disk, no other's find. Empty: the engine's own."""

    _handle: EngineHandle = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, values: Any) -> Any:
        """Say what an unknown field might have been meant for."""
        if not isinstance(values, Mapping):
            return values
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)}
        check_fields(cls.__name__, values, known)
        return values

    @model_validator(mode="after")
    def _bind_layerstream_engine(self) -> Self:
        """Bind the engine, which loads at first use."""
        chosen = self.model if "model" in self.model_fields_set else None
        self._handle = EngineHandle(chosen, self.engine_kwargs, self.engine)
        if self._handle.reuses_anywhere:
            watch_retrievers()
        self.model = self._handle.model
        return self

    def load(self) -> LayerStream:
        """The engine, loaded if it is not yet: its ``stats()``, ``plan`` and ``warm``."""
        return self._handle.get()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with the same engine."""
        memo = {} if memo is None else memo
        memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        if self.engine is not None:
            self._handle.__getstate__()  # says why it cannot be
        return super().__getstate__()

    def _terms(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """On which terms the engine takes a request: the instance's, or the call's."""
        return terms_of(self, kwargs)

    def _configured(self, config: RunnableConfig | None = None) -> dict[str, Any]:
        """The terms that a call's *config*, or that of the chain around it, has in ``configurable``.

        Raises:
            ConfigurationError: a term by another name than its own.
        """
        check_names(self, config)
        return configured_terms(config)

    def _tenant_of(self, config: RunnableConfig | None = None) -> str:
        """Whose a call is."""
        return self._configured(config).get("tenant", self.tenant)
