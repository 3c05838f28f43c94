"""FastAPI: an endpoint whose answers stream; a client that leaves takes its request along.

    uvicorn fastapi_server:app --app-dir examples
    curl -N 'localhost:8000/ask?question=Who+leads+Brenvik%3F'

``LAYERSTREAM_MODEL`` names another model. Requests that come together share their sweeps.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import layerstream
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from langchain_layerstream import ChatLayerStream, rag_prompt
from layerstream.demo.retrieval import Retriever, load_documents

app = FastAPI()
documents = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))
chain = rag_prompt() | ChatLayerStream(max_tokens=32, timeout=600)  # loaded at the first question


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    found = documents.retrieve(question, 2)
    if not found:
        raise HTTPException(404, "no document is about that")

    async def pieces() -> AsyncIterator[str]:
        context = "\n\n".join(passage.text for passage in sorted(found))
        async for message in chain.astream({"context": context, "input": question}):
            yield message.text  # a client that hangs up cancels this, and with it the request

    return StreamingResponse(pieces(), media_type="text/plain")
