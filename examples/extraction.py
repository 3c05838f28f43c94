"""LangChain: documents into pydantic objects. The grammar sees to the form; what it forces takes no sweep.

python examples/extraction.py [--model FOLDER --memory 3GiB]
"""

import argparse
from pathlib import Path

import layerstream
from langchain_core.prompts import ChatPromptTemplate
from langchain_layerstream import ChatLayerStream
from pydantic import BaseModel

FOLDER = Path(layerstream.__file__).parent / "demo" / "documents"


class Unit(BaseModel):
    """What a document says about a unit."""

    name: str
    leader: str
    location: str


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

engine_options = {"memory": arguments.memory} if arguments.memory else {}
llm = ChatLayerStream(model=arguments.model, max_tokens=120, engine_kwargs=engine_options)
prompt = ChatPromptTemplate.from_messages(
    [
        ("system", "Use the given context to answer the question.\n\nContext: {context}"),
        ("human", "Extract what the context says about {name}."),
    ]
)
chain = prompt | llm.with_structured_output(Unit)  # its batch shares every sweep
inputs = [{"context": (FOLDER / f"{name.lower()}.md").read_text(), "name": name} for name in ("Brenvik", "Vanorth")]
for unit in chain.batch(inputs):
    print(repr(unit))
