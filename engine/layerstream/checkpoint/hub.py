"""From what the user calls a model to the folder it lies in."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from layerstream.errors import CheckpointNotFound, GatedRepository, StorageFull

DEMO = "demo"
_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt")
_NOT_NEEDED = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*", "*.msgpack", "*.h5")


def bundled_reader() -> Path:
    """The folder of the reader that comes with the package."""
    return Path(__file__).parent.parent / "demo" / "reader"


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The local folder of *model*: ``"demo"``, a folder, or a hub id, whose files are fetched if they are not here.

    Raises:
        GatedRepository: the hub wants an access request or a token.
        CheckpointNotFound: no such folder, repository or revision, or no network and not in the cache.
        StorageFull: no room for the files.
    """
    name = os.fspath(model)
    if name == DEMO:
        return bundled_reader()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointNotFound(
            f"{name!r} is no folder here and no hub id ('owner/name'); expected one of these, or 'demo'"
        )
    return _fetch(name, revision, token, trust_remote_code)


def _fetch(repo: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    needed: list[str] = [*_NEEDED, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(
            repo, revision=revision, token=token, allow_patterns=needed, ignore_patterns=list(_NOT_NEEDED)
        )
    except GatedRepoError as error:
        raise GatedRepository(
            f"{repo} is gated: ask for access at https://huggingface.co/{repo}, then log in with "
            "'hf auth login' or pass token="
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointNotFound(
            f"the hub has no model {repo!r}{at} that you can see, and there is no such folder here; a "
            "private one needs token= or 'hf auth login'"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(
                f"the disk is full; {repo!r} goes to {HF_HUB_CACHE}: free some room there, or set HF_HOME to a "
                "folder elsewhere; what was fetched is kept, and the next try goes on from there",
            ) from error
        raise CheckpointNotFound(
            f"{repo!r} is not in the local cache and could not be fetched: {error}; check the network or pass a folder"
        ) from error
    return Path(folder)
