"""Retrieval-augmented generation with LangChain: retriever, prompt, model, parser."""

from pathlib import Path

import layerstream
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_layerstream import LayerStreamLLM
from layerstream.demo.retrieval import Retriever, join_passages, load_documents

# The bundled documents; any folder of txt, md and pdf files will do, and any LangChain retriever.
retriever = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))
retrieve = RunnableLambda(lambda question: join_passages(retriever.retrieve(question, 2)))

# The context comes before the question: what is retrieved again begins with the same tokens.
prompt = PromptTemplate.from_template("Context:\n{context}\n\nQuestion: {question}\nAnswer:")
model = LayerStreamLLM(model="demo", max_tokens=16)
chain = {"context": retrieve, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()

QUESTIONS = ["Who supplies Tolmar Archive?", "Who ordered Project Drusveld?"]
for question, answer in zip(QUESTIONS, chain.batch(QUESTIONS), strict=True):
    print(f"{question} {answer.strip()}")
