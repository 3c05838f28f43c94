"""LlamaIndex's messages to those of chat templates, and replies to LlamaIndex's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.llm import ToolSelection

from layerstream.api.prompt_layout import PromptLayout, arranged
from layerstream.chat.reader import Reply, ToolCall


def as_chat(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """What the engine's chats are made of."""
    return [_as_message(message) for message in messages]


def arrange(messages: Sequence[ChatMessage], layout: PromptLayout) -> list[ChatMessage]:
    """*messages*, with the texts of users and the system as *layout* wants them."""
    return [_arranged(message, layout) for message in messages]


def as_blocks(reply: Reply) -> list[ContentBlock]:
    """A reply, whole or as far as it is there, as blocks of a message."""
    blocks: list[ContentBlock] = []
    if reply.thought:
        blocks.append(ThinkingBlock(content=reply.thought))
    if reply.text or not reply.calls:
        blocks.append(TextBlock(text=reply.text))
    for call in reply.calls:
        blocks.append(ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=_kwargs(call)))
    return blocks


def selections(message: ChatMessage) -> list[ToolSelection]:
    """The tool calls of a message that are complete."""
    return [
        ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=dict(block.tool_kwargs))
        for block in message.blocks
        if isinstance(block, ToolCallBlock) and isinstance(block.tool_kwargs, dict)
    ]


def _kwargs(call: ToolCall) -> dict[str, Any] | str:
    """The arguments; while they are not complete, their text."""
    return call.text if call.arguments is None else call.arguments


def _arranged(message: ChatMessage, layout: PromptLayout) -> ChatMessage:
    if message.role not in (MessageRole.USER, MessageRole.SYSTEM):
        return message
    blocks = [
        block.model_copy(update={"text": arranged(block.text, layout)}) if isinstance(block, TextBlock) else block
        for block in message.blocks
    ]
    return message if blocks == message.blocks else message.model_copy(update={"blocks": blocks})


def _as_message(message: ChatMessage) -> dict[str, Any]:
    more = message.additional_kwargs
    result: dict[str, Any] = {"role": message.role.value}
    calls = [
        {
            "id": block.tool_call_id,
            "type": "function",
            "function": {"name": block.tool_name, "arguments": block.tool_kwargs},
        }
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ] or [_as_dict(call) for call in more.get("tool_calls") or ()]
    result["content"] = [
        {"type": "text", "text": block.text} if isinstance(block, TextBlock) else {"type": block.block_type}
        for block in message.blocks
        if not isinstance(block, ToolCallBlock | ThinkingBlock)
    ]
    if calls:
        result["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if name in more:
            result[name] = more[name]
    return result


def _as_dict(call: Any) -> Any:
    """A call in OpenAI's form, as other integrations keep it: a mapping, or OpenAI's own object."""
    return call.model_dump() if isinstance(call, BaseModel) else call
