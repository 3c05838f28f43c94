"""LangChain: an agent that looks things up before it answers, and fills in a form if asked to.

    python examples/langchain_agent.py [question] [--model FOLDER --memory 3GiB]

Needs ``pip install langchain``, for ``create_agent``. Every model can be given tools.
"""

import argparse
from pathlib import Path

import layerstream
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, ToolMessage
from langchain_layerstream import ChatLayerStream
from layerstream.demo.retrieval import Retriever, load_documents

documents = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))


def search(query: str) -> str:
    """Finds documents about something."""
    return "\n\n".join(passage.text for passage in documents.retrieve(query, 1)) or "Nothing found."


parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="?", default="Who supplies Tolmar Archive?")
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

engine_options = {"memory": arguments.memory} if arguments.memory else {}
llm = ChatLayerStream(model=arguments.model, max_tokens=64, engine_kwargs=engine_options)
agent = create_agent(llm, [search])  # response_format=SomePydanticClass for an answer in a form
for update in agent.stream({"messages": [("user", arguments.question)]}, stream_mode="updates"):
    for message in (message for part in update.values() for message in part["messages"]):
        if isinstance(message, ToolMessage):
            print(f"  brought {len(message.text)} characters")
        elif isinstance(message, AIMessage) and message.tool_calls:
            print(f"  {message.tool_calls[0]['name']}({message.tool_calls[0]['args']})")
        else:
            print(f"{arguments.question} {message.text.strip()}")
