"""What the caller may say about the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from layerstream import ConfigurationError, KVStoreConfig, LayerStream
from layerstream.store.config import DEFAULT_BYTES, default_folder, store_config


def test_what_kv_store_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAYERSTREAM_KV_STORE")
    assert store_config(None) is None
    assert store_config("auto") == KVStoreConfig()
    assert store_config(tmp_path) == KVStoreConfig(folder=tmp_path)
    given = KVStoreConfig(salt="a")
    assert store_config(given) is given
    for value in (5, "", True):
        with pytest.raises(ConfigurationError, match="expected 'auto', None, a folder or a KVStoreConfig"):
            store_config(value)


@pytest.mark.parametrize("value", ["off", "OFF", "none", "0"])
def test_the_environment_switches_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSTREAM_KV_STORE", value)
    assert store_config("auto") is None


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERSTREAM_KV_STORE", str(tmp_path / "here"))
    assert default_folder() == tmp_path / "here"
    assert KVStoreConfig().path == tmp_path / "here"
    assert KVStoreConfig(folder=tmp_path).path == tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "zip"}, "compression is 'zip'; expected one of 'none', 'int8', 'fp8'"),
        ({"load": "sometimes"}, "load is 'sometimes'"),
        ({"salt": 3}, "salt is 3"),
        ({"max_bytes": "many"}, "cannot read 'many' as a size"),
        ({"min_free_bytes": -1}, "a size is positive"),
    ],
)
def test_bad_values_name_the_field(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        KVStoreConfig(**options)


def test_the_default_bound_is_modest(tmp_path: Path) -> None:
    assert 0 < KVStoreConfig(tmp_path / "new").bound(0) <= DEFAULT_BYTES
    assert KVStoreConfig(tmp_path, max_bytes="3GB").bound(0) == 3 * 10**9


def test_chunks_of_odd_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="chunk_tokens is 100; expected one of"):
        LayerStream("demo", chunk_tokens=100)
