"""Moving from Ollama to LayerStream: what changes in a LangChain program.

python examples/from_ollama.py [--model FOLDER --memory 3GiB]
"""

import argparse

from langchain_core.messages import HumanMessage, SystemMessage

# from langchain_ollama import ChatOllama
from langchain_layerstream import ChatLayerStream

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

# llm = ChatOllama(model="llama3.1:70b", temperature=0, num_predict=64, num_ctx=4096, format="json", keep_alive="1h")
llm = ChatLayerStream(
    model=arguments.model,  # a folder, a hub id or the .gguf file that Ollama keeps under ~/.ollama/models/blobs
    temperature=0,
    max_tokens=64,  # num_predict
    engine_kwargs={
        "max_context": 2048,  # num_ctx; without it, the model's own
        "memory": arguments.memory,  # instead of num_gpu: how much memory there is, and the rest streams
    },
    # format="json" is llm.with_structured_output(Schema); keep_alive is the life of this object;
    # tool_choice, which Ollama ignores, is kept to; the KV of contexts outlives the process.
)

messages = [
    SystemMessage("Use the given context to answer the question.\n\nContext: Brenvik is led by Sluba Merkast."),
    HumanMessage("Who leads Brenvik?"),
]
answer = llm.invoke(messages)
print(answer.text.strip())
usage = answer.usage_metadata or {}
print(f"{usage['input_tokens']} + {usage['output_tokens']} tokens")  # prompt_eval_count, eval_count
