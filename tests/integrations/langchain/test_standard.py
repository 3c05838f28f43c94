"""LangChain's own suites for chat models, complete.

On a random model: what the grammar, the messages and the plumbing carry has to pass. Only what depends on a model that
understands the question is marked; with ``LAYERSTREAM_TEST_MODEL`` in the environment these run on that model and pass.
"""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_layerstream import ChatLayerStream
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from tests.integrations.conftest import CAPABLE, needs_a_capable_model


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLayerStream

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo"}

    @property
    def supports_image_inputs(self) -> bool:
        return False


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _model(self, babbler: str) -> None:
        self._folder = babbler

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLayerStream

    @property
    def chat_model_params(self) -> dict[str, Any]:
        drawn = {} if CAPABLE else {"temperature": 0.8, "seed": 6, "max_tokens": 120}
        return {"model": self._folder, "engine_kwargs": {"kv_store": None, "progress": False}, **drawn}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:  # type: ignore[override]
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        """A prompt that was there before."""
        model = self.chat_model_class(**self.chat_model_params)
        question = "the quick brown fox jumps over the lazy dog. " * 40
        model.invoke(question)
        if not stream:
            return model.invoke(question)
        whole: Any = None
        for chunk in model.stream(question):
            whole = chunk if whole is None else whole + chunk
        return whole

    @needs_a_capable_model
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @needs_a_capable_model
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @needs_a_capable_model
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)

    @needs_a_capable_model
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
