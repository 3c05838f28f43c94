"""From what the user calls a model to the folder it lies in."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever client the hub uses
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
    XetDownloadError,
)
from huggingface_hub.utils import SafetensorsFileMetadata

from layerstream.checkpoint.folder import open_folder
from layerstream.errors import (
    CheckpointError,
    CheckpointNotFound,
    GatedRepository,
    InvalidHeader,
    StorageFull,
    UnsupportedFormat,
)
from layerstream.hardware.machine import cache_folder

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


def locate_headers(model: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """A folder that has the model's config and the headers of its weights, and no weights: what a plan needs.

    Of what is here already, the folder itself. Of what is only on the hub, configs and headers are fetched, a few MB at
    most; every file of weights is as long as the real one, and empty, which takes no room on the disk.

    Raises:
        As :func:`locate`.
    """
    path = Path(model).expanduser()
    if model == DEMO or path.exists() or model.count("/") != 1:
        return locate(model)
    with _explained(model, revision):
        folder = Path(
            snapshot_download(
                model, revision=revision, token=token, allow_patterns=["*.json", "*.jinja"], ignore_patterns=["*/*"]
            )
        )
        if _is_whole(folder):
            return folder
        found = HfApi(token=token).get_safetensors_metadata(model, revision=revision)
        target = headers_folder(f"{model.replace('/', '--')}/{folder.name}")
        for side in folder.glob("*.json"):
            shutil.copyfile(side, target / side.name)
        for name, file in found.files_metadata.items():
            write_empty(target / Path(name).name, _entries(file))
    return target


def are_weights_here(folder: Path) -> bool:
    """Whether *folder* is more than :func:`locate_headers` makes."""
    return not folder.is_relative_to(_headers())


def _is_whole(folder: Path) -> bool:
    """Whether all weights of the model in *folder* are in it."""
    try:
        open_folder(folder)
    except CheckpointError:
        return False
    return True


def _headers() -> Path:
    return cache_folder() / "headers"


def headers_folder(name: str) -> Path:
    """A folder of that *name* for configs and headers without weights."""
    target = _headers() / name
    target.mkdir(parents=True, exist_ok=True)
    return target


def write_empty(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """A safetensors file with a header of *entries*, and nothing behind it."""
    header = json.dumps(entries).encode()
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    with path.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + end)


def _entries(file: SafetensorsFileMetadata) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        for name, tensor in file.tensors.items()
    }


def _fetch(repo: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    needed: list[str] = [*_NEEDED, *(["*.py"] if trust_remote_code else [])]
    with _explained(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, token=token, allow_patterns=needed, ignore_patterns=list(_NOT_NEEDED)
            )
        )


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub as ours."""
    try:
        yield
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
    except NotASafetensorsRepoError as error:
        raise UnsupportedFormat(f"{repo} has no safetensors files at its top: {error}") from error
    except SafetensorsParsingError as error:
        raise InvalidHeader(f"{repo} has a safetensors file on the hub that cannot be read: {error}") from error
    except (EntryNotFoundError, HTTPError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(
                f"the disk is full; {repo!r} goes to {HF_HUB_CACHE}: free some room there, or set HF_HOME to a "
                "folder elsewhere; what was fetched is kept, and the next try goes on from there",
            ) from error
        raise CheckpointNotFound(_why_not_fetched(repo, error)) from error


def _why_not_fetched(repo: str, error: Exception) -> str:
    """One sentence for the hub's several."""
    cause = error.__cause__ or error
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"{repo!r} is not in the local cache ({HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it: unset that, "
            "or pass a folder"
        )
    if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
        reason, advice = f"the hub answers {cause.response.status_code}", "try again later, or pass a folder"
    elif isinstance(cause, PermissionError):
        reason, advice = f"{cause.filename}: {cause.strerror}", "set HF_HOME to a folder that can be written"
    else:
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        advice = "check the network, or pass a folder"
    return f"{repo!r} is not in the local cache and could not be fetched ({reason}): {advice}"
