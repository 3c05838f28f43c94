"""Many questions through a chain, at once: they share every sweep.

python examples/multi_query.py [--model FOLDER --memory 3GiB]
"""

import argparse
from pathlib import Path

import layerstream
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_layerstream import ChatLayerStream, gang, rag_prompt
from layerstream.demo.retrieval import Retriever, load_documents

QUESTIONS = [
    "Who leads Brenvik?",
    "In which year was Jaskeld founded?",
    "Where is Vanorth located?",
    "Who supplies Tolmar Archive?",
    "When can I visit Pelvast Library?",
    "Who runs Project Frostag?",
]

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

search = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))  # BM25


def retrieve(question: str) -> list[Document]:
    return [Document(passage.text) for passage in search.retrieve(question, 1)]


with layerstream.LayerStream(arguments.model, memory=arguments.memory) as engine:
    llm = ChatLayerStream(engine=engine, max_tokens=32)
    context = RunnablePassthrough.assign(context=lambda given: given["documents"][0].page_content)
    chain = {"documents": RunnableLambda(retrieve), "input": RunnablePassthrough()} | RunnablePassthrough.assign(
        answer=context | rag_prompt() | llm
    )
    alone = 0
    # LangChain would run a chain within a chain a few at a time; gang() lets all of them reach the model together.
    for question, result in zip(QUESTIONS, gang(chain).batch(QUESTIONS), strict=True):
        print(f"{question} {result['answer'].text.strip()}")
        alone += result["answer"].response_metadata["metrics"]["sweeps"]
    print(f"{engine.stats().sweeps} sweeps; one after the other it would have been {alone}")
