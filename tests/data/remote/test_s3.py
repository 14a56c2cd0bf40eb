"""A set in a bucket: moto's S3 server on loopback, and the driver that users have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from wasteddp.data import dataset
from wasteddp.data.dataset import RemoteShardSet
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.errors import DamagedSampleError, RemoteError, ShardError
from wasteddp.settings import Data


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="fsspec's driver for s3 comes with the extra remote")
    moto = pytest.importorskip("moto.server", reason="moto's server comes with the extra dev")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, small_shards: Path) -> fsspec.AbstractFileSystem:
    """A file system with the set in s3://waste/set; credentials and endpoint come from the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.invalidate_cache()
    store.mkdirs("waste", exist_ok=True)
    store.put(str(small_shards) + "/", "waste/set", recursive=True)
    return store


def data(tmp_path: Path, url: str = "s3://waste/set") -> Data:
    return Data(shards=url, cache=str(tmp_path), read_timeout_s=5, read_attempts=2)


def test_a_bucket_is_read_like_a_folder(bucket: fsspec.AbstractFileSystem, small_shards: Path, tmp_path: Path) -> None:
    with (
        SplitReader(Manifest.load(small_shards), "train") as local,
        dataset.open_dataset(data(tmp_path)) as shards,
        shards.reader("train") as reader,
    ):
        assert isinstance(shards, RemoteShardSet)
        for sample in range(reader.num_samples):
            assert reader.read(sample) == local.read(sample)
        assert reader.describe(0).startswith("s3://waste/set/train-000000.tar")


def test_what_a_bucket_lacks_is_named(bucket: fsspec.AbstractFileSystem, small_shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(small_shards)
    first, second = manifest.split("train").shards[:2]
    bucket.rm_file(f"waste/set/{first.tar}")
    bucket.pipe_file(f"waste/set/{second.tar}", (small_shards / second.tar).read_bytes()[:-512])
    with dataset.open_dataset(data(tmp_path)) as shards, shards.reader("train") as reader:
        with pytest.raises(DamagedSampleError, match=rf"s3://waste/set/{first.tar} .*attempt 1 of 2.*404 Not Found"):
            reader.read(0)
        expected = rf"{second.tar} .*it has {second.num_bytes - 512:,} bytes instead of {second.num_bytes:,}"
        with pytest.raises(DamagedSampleError, match=expected):
            reader.read(first.num_samples)
    with pytest.raises(ShardError, match=r"s3://waste/none/manifest.json cannot be read .*404 Not Found"):
        dataset.open_dataset(data(tmp_path, "s3://waste/none")).__enter__()


def test_a_bucket_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="fsspec's driver for s3 comes with the extra remote")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the port of discard, where nobody listens
    with pytest.raises(RemoteError, match=r"s3://waste/set/manifest.json cannot be read \(attempt 2 of 2\)"):
        dataset.open_dataset(data(tmp_path)).__enter__()
