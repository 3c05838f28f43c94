"""Every error LayerStream raises on purpose, as one tree.

::

    LayerStreamError
    ├── ConfigurationError (ValueError)      a value the caller chose cannot work
    │   ├── InvalidSize                      "3GBs", negative, not a number
    │   ├── InvalidSamplingParams            names the field and the allowed range
    │   ├── GrammarError                     a response_format that cannot be read or met, with the reason
    │   ├── ToolError                        a tool, or a choice of tools, that cannot be used
    │   └── BudgetTooSmall                   names the minimum
    ├── PromptError (ValueError)
    │   ├── EmptyPrompt
    │   └── PromptTooLong
    ├── CheckpointError                      the model's files
    │   ├── CheckpointNotFound
    │   ├── GatedRepository                  says where to ask for access
    │   ├── InvalidHeader                    a header that lies
    │   ├── TruncatedFile
    │   ├── MissingTensor
    │   └── UnsupportedFormat                pickles, unknown dtypes
    ├── DocumentError (ValueError)           a folder of documents with nothing that can be read
    ├── MissingExtra (ImportError)           says what to install
    ├── UnsupportedModel                     a family outside the tested list, with the reason
    ├── KVStoreUnusable (OSError)            a folder that cannot hold the KV store, with the reason
    ├── StorageFull (OSError)                no room on the disk; what is there already is kept
    ├── ReadError (OSError)                  the disk failed in the middle of a sweep
    ├── InvalidRouting                       a router that names an expert that is not there: damaged weights
    ├── InvalidLogits                        NaN, or nothing finite: damaged weights or an overflow
    ├── OutOfMemory (MemoryError)            not even a small sweep fits; says what would help
    ├── DeviceLost (RuntimeError)            the accelerator will not compute again in this process
    ├── AnswerCutOff (ValueError)            an answer that had to be whole (JSON, a call) ended before it was
    ├── QueueFull (RuntimeError)             more requests than may wait; says how many do
    ├── RequestTimeout (TimeoutError)
    ├── WaitsForItself (RuntimeError)        the engine's own thread was to wait for the engine
    └── EngineClosed (RuntimeError)          closed, ended, or another process's: says which

A message says what was found, what was expected, and what to do next. Catching
:class:`LayerStreamError` catches all of them; each also derives from the builtin that
a caller would have guessed.
"""

from __future__ import annotations

SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """*value* for a message: its repr, cut short; never raises, whatever it is."""
    try:
        found = repr(value)
    except Exception:  # noqa: BLE001  # an int of thousands of digits, or a class of the caller's own
        return f"{type(value).__name__} that cannot be shown"
    return found if len(found) <= SHOWN_CHARACTERS else f"{found[: SHOWN_CHARACTERS - 1]}…"


class LayerStreamError(Exception):
    """Base of every error raised on purpose by this library."""


class ConfigurationError(LayerStreamError, ValueError):
    """A value the caller chose cannot work."""


class InvalidSize(ConfigurationError):
    """A size such as ``"3GiB"`` that cannot be read."""


class InvalidSamplingParams(ConfigurationError):
    """A sampling field outside its range."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"SamplingParams.{field} is {shown(value)}; expected {expected}")
        self.field = field


class GrammarError(ConfigurationError):
    """A response format that does not compile, that nothing can meet, or that an answer got stuck in."""


class ToolError(ConfigurationError):
    """A tool that is none, a choice of one that is not there, or one that the model cannot be given."""


class BudgetTooSmall(ConfigurationError):
    """The memory budget cannot hold what one sweep needs at the least."""

    def __init__(self, message: str, *, budget_bytes: int, required_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.required_bytes = required_bytes


class PromptError(LayerStreamError, ValueError):
    """A prompt that cannot be run."""


class EmptyPrompt(PromptError):
    """A prompt without a single token."""


class PromptTooLong(PromptError):
    """More tokens (``num_tokens``) than the model's context, or than the KV budget, can hold."""

    def __init__(self, message: str, *, num_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens


class CheckpointError(LayerStreamError):
    """The model's files are missing, damaged or of a kind that cannot be streamed."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """No model at the place named, or a shard of it is missing."""


class GatedRepository(CheckpointError, PermissionError):
    """The hub asks for an access request or a token."""


class InvalidHeader(CheckpointError):
    """A file header whose claims contradict each other or the file."""


class TruncatedFile(CheckpointError):
    """A file shorter than its header says."""


class MissingTensor(CheckpointError):
    """The model has a parameter that no tensor of the checkpoint fills."""


class UnsupportedFormat(CheckpointError):
    """Weights in a format that is refused (pickles) or not understood."""


class DocumentError(LayerStreamError, ValueError):
    """Documents that cannot be read, or none where some were expected."""


class MissingExtra(LayerStreamError, ImportError):
    """A package is missing that one of the extras brings."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; it comes with: pip install 'layerstream[{extra}]'")
        self.module = module
        self.extra = extra


class UnsupportedModel(LayerStreamError):
    """A model family that LayerStream does not run, and why."""


class KVStoreUnusable(LayerStreamError, OSError):
    """A folder that cannot be used as a KV store; nothing in it was changed."""


class StorageFull(LayerStreamError, OSError):
    """No room on the disk for what has to be written."""


class ReadError(LayerStreamError, OSError):
    """Reading weights failed in the middle of a sweep; the next sweep tries again."""


class InvalidRouting(LayerStreamError):
    """A mixture's router sent a row to an expert that is not there."""


class InvalidLogits(LayerStreamError, ArithmeticError):
    """The model's logits for a sequence are unusable; that request fails, its neighbours go on."""


class OutOfMemory(LayerStreamError, MemoryError):
    """A sweep did not fit the memory, and there was nothing left to make smaller; its requests fail, others go on."""


class DeviceLost(LayerStreamError, RuntimeError):
    """The accelerator failed for good; requests fail, the process goes on, and a new process can use it again."""


class AnswerCutOff(LayerStreamError, ValueError):
    """An answer that had to be whole, a structured one or a tool call, ended before it was; a part is no value."""


class RequestTimeout(LayerStreamError, TimeoutError):
    """The answer was not there in time: the request was given up if it had a time-out of its own, else it goes on."""


class QueueFull(LayerStreamError, RuntimeError):
    """As many answers wait as may; nothing was handed in."""

    def __init__(self, num_waiting: int, num_more: int, max_queued: int) -> None:
        super().__init__(
            f"{num_waiting} answers wait already and {num_more} more were asked for, and {max_queued} may wait: take "
            "some results first and submit again, or give the engine a larger max_queued"
        )
        self.num_waiting = num_waiting
        self.max_queued = max_queued


class WaitsForItself(LayerStreamError, RuntimeError):
    """A callback on the engine's thread waits for an answer that only this thread can bring."""


class EngineClosed(LayerStreamError, RuntimeError):
    """The engine was closed, or came to an end, while or before the request ran; or it is another process's."""
