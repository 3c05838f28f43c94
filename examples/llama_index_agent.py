"""LlamaIndex: an agent that looks things up before it answers. Every model can be given tools.

python examples/llama_index_agent.py [question] [--model FOLDER --memory 3GiB]
"""

import argparse
import asyncio
from pathlib import Path

import layerstream
from layerstream.demo.retrieval import Retriever, load_documents
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.llms.layerstream import LayerStreamLLM

documents = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))


def search(query: str) -> str:
    """Finds documents about something."""
    return "\n\n".join(passage.text for passage in documents.retrieve(query, 1)) or "Nothing found."


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default="Who supplies Tolmar Archive?")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--memory")
    arguments = parser.parse_args()
    engine_options = {"memory": arguments.memory} if arguments.memory else {}
    llm = LayerStreamLLM(arguments.model, max_new_tokens=64, engine_kwargs=engine_options)
    # A real model may be given the tool and left to decide (leave initial_tool_choice out).
    agent = FunctionAgent(tools=[search], llm=llm, initial_tool_choice="search")
    run = agent.run(arguments.question)
    async for event in run.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"  {event.tool_name}({event.tool_kwargs}) brought {len(event.tool_output.content)} characters")
    print(f"{arguments.question} {str(await run).strip()}")


asyncio.run(main())
