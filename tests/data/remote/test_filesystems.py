"""Sets at gs:// and hf://: the drivers that users have, against what the stores answer, on loopback."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from faulty_server import Fault, FaultyServer, serving
from store_stubs import GOOGLE_URL, HUB_URL, TOKEN, google, hub

from wasteddp import cli
from wasteddp.data import dataset
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote import filesystems
from wasteddp.data.remote import folder as remote
from wasteddp.errors import DamagedSampleError, DamagedShardError, RemoteError, SettingsError, ShardError
from wasteddp.settings import Data

NOBODY = "http://127.0.0.1:9"  # the port of discard, where nobody listens


@dataclass
class Place:
    """A store with the set in it."""

    url: str
    server: FaultyServer
    logins: list[tuple[str, str]] = field(default_factory=list)


def use_google(monkeypatch: pytest.MonkeyPatch, address: str, home: Path) -> None:
    pytest.importorskip("gcsfs", reason="fsspec's driver for gs comes with the extra remote")
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(home))  # no credentials there
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="it comes with the extra remote")
    monkeypatch.setattr(constants, "ENDPOINT", address)  # HF_ENDPOINT, which is read at import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(params=["gs", "hf"])
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_shards: Path, tmp_path: Path
) -> Iterator[Place]:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    logins: list[tuple[str, str]] = []
    route = google(small_shards) if request.param == "gs" else hub(small_shards, logins)
    with serving(small_shards, route=route) as server:
        if request.param == "gs":
            use_google(monkeypatch, server.url, tmp_path)
        else:
            use_hub(monkeypatch, server.url)
        yield Place(GOOGLE_URL if request.param == "gs" else HUB_URL, server, logins)


@pytest.fixture
def data(place: Place, tmp_path: Path) -> Callable[..., Data]:
    def of(url: str = place.url, *, fetchers: int = 1) -> Data:
        return Data(shards=url, cache=str(tmp_path / "cache"), read_timeout_s=1, read_attempts=3, fetchers=fetchers)

    return of


def train_images(data: Data) -> list[bytes]:
    with dataset.open_dataset(data) as shards, shards.reader("train") as reader:
        return [reader.read(sample) for sample in range(reader.num_samples)]


def first(name: str, fault: Fault) -> Callable[[str, int], Fault | None]:
    """The fault in the first request for a file."""
    left = [fault]
    return lambda asked, number: left.pop() if asked == name and left else None


def of_drivers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What drivers print beside our one message. That there are no credentials, google.auth may say."""
    found = (record for record in caplog.records if record.levelno >= logging.WARNING)
    return [record.getMessage() for record in found if not record.name.startswith("google.auth")]


def test_a_set_is_read_like_a_folder_and_fetched_once(
    place: Place, data: Callable[..., Data], small_shards: Path
) -> None:
    with SplitReader(Manifest.load(small_shards), "train") as local:
        images = [local.read(sample) for sample in range(local.num_samples)]
    for _ in range(2):  # the second time from the cache
        assert train_images(data()) == images
    wanted = {shard.tar for shard in Manifest.load(small_shards).split("train").shards}
    assert place.server.fetches() == dict.fromkeys(sorted(wanted), 1)


@pytest.mark.parametrize("fault", ["503", "429", "cut", "stall"])
def test_what_may_pass_is_tried_again_and_only_by_us(
    place: Place, data: Callable[..., Data], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with dataset.open_dataset(data()) as shards, shards.reader("train") as reader:
        place.server.faults = first("train-000000.tar", fault)
        began = time.monotonic()
        reader.read(0)
        assert time.monotonic() - began < 6
    assert place.server.asked["train-000000.tar"] == 2
    assert not of_drivers(caplog)


def test_a_store_that_stays_so_is_asked_as_often_as_we_say(place: Place, data: Callable[..., Data]) -> None:
    with dataset.open_dataset(data()) as shards, shards.reader("train") as reader:
        place.server.faults = lambda name, number: "503"
        with pytest.raises(RemoteError) as caught:
            reader.read(0)
    assert caught.value.found.startswith(f"{place.url}/train-000000.tar cannot be read at byte 0 of ")
    assert caught.value.found.endswith("(attempt 3 of 3): 503 Service Unavailable")
    assert place.server.asked["train-000000.tar"] == 3


@pytest.mark.parametrize(("status", "why"), [("403", "403 Forbidden"), ("401", "401 Unauthorized")])
def test_a_refusal_is_not_asked_again(place: Place, data: Callable[..., Data], status: str, why: str) -> None:
    place.server.faults = lambda name, number: status
    with pytest.raises(RemoteError, match=rf"manifest.json cannot be read \(attempt 1 of 3\): {why}") as caught:
        dataset.open_dataset(data()).__enter__()
    assert "permission to read there" in caught.value.remedy


def test_a_missing_and_a_cut_shard_are_named(
    place: Place, data: Callable[..., Data], small_shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, other = Manifest.load(small_shards).split("train").shards[:2]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small_shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: -512 if path.name == other.tar else None])
    (copy / one.tar).unlink()
    place.server.folder = copy
    place.server.route = google(copy) if place.url == GOOGLE_URL else hub(copy, [])
    with dataset.open_dataset(data()) as shards, shards.reader("train") as reader:
        with pytest.raises(DamagedSampleError, match=rf"{place.url}/{one.tar} .*attempt 1 of 3.*404 Not Found"):
            reader.read(0)
        wrong = f"it has {other.num_bytes - 512:,} bytes instead of {other.num_bytes:,}"
        with pytest.raises(DamagedSampleError, match=rf"{place.url}/{other.tar} .*{wrong}"):
            reader.read(one.num_samples)


def test_a_folder_without_a_manifest_is_named(data: Callable[..., Data], place: Place) -> None:
    url = f"{place.url.removesuffix('set')}none"
    with pytest.raises(ShardError, match=rf"{url}/manifest.json cannot be read .*404 Not Found"):
        dataset.open_dataset(data(url)).__enter__()


def test_verify_re_reads_it(
    place: Place, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", place.url, "--workers", "1"]) == 0
    assert f"{place.url} is whole: 73 samples in" in capsys.readouterr().out
    copy = Path(shutil.copytree(small_shards, tmp_path / "copy"))
    with (copy / "train-000000.tar").open("r+b") as file:
        file.write(b"x")
    place.server.folder = copy
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", place.url, "--workers", "1"])
    assert "train-000000.tar: another sha256" in capsys.readouterr().err


def test_a_folder_is_listed(place: Place, small_shards: Path) -> None:
    store = filesystems.open_store(f"{place.url}/", 5.0)
    assert store.names(limit_s=5, look=lambda: None) == sorted(path.name for path in small_shards.iterdir())


@pytest.mark.parametrize("store", ["gs", "hf"])
def test_without_a_network_and_without_credentials_nothing_waits_or_asks(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if store == "gs":
        use_google(monkeypatch, NOBODY, tmp_path)
    else:
        use_hub(monkeypatch, NOBODY)
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    url = GOOGLE_URL if store == "gs" else HUB_URL
    began = time.monotonic()
    with pytest.raises(RemoteError, match=rf"{url}/manifest.json cannot be read \(attempt 2 of 2\): ClientConnectorE"):
        dataset.open_dataset(Data(shards=url, cache=str(tmp_path), read_timeout_s=2, read_attempts=2)).__enter__()
    assert time.monotonic() - began < 10
    assert not of_drivers(caplog)


def test_a_login_that_cannot_be_proved_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_google(monkeypatch, NOBODY, tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", NOBODY)  # where gcsfs would send it to
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "ya29.secret"})  # FSSPEC_GS_TOKEN, which is read at import
    with pytest.raises(SettingsError, match=r"^gs://waste/set cannot be opened: ProxyError") as caught:
        filesystems.open_store(GOOGLE_URL, 5.0)
    assert "secret" not in str(caught.value)


def test_the_hubs_login_goes_to_the_hub_alone(
    monkeypatch: pytest.MonkeyPatch, small_shards: Path, tmp_path: Path
) -> None:
    logins: list[tuple[str, str]] = []
    with serving(small_shards, route=hub(small_shards, logins)) as server:
        use_hub(monkeypatch, server.url)
        train_images(Data(shards=HUB_URL, cache=str(tmp_path)))
    sent = {path.startswith("/elsewhere/"): login for path, login in logins}
    assert sent == {False: f"Bearer {TOKEN}", True: ""}


_AS_USERS_DO = """
import sys
import fsspec
from wasteddp.data.remote import filesystems as stores
url, name = sys.argv[1:]
store = stores.open_store(url, 5.0)
driver, root = fsspec.core.url_to_fs(url)
assert type(driver).__name__ == "HfFileSystem"
print(store.path_of(name))
print(driver.url(f"{root}/{name}"))
print(len(store.ask("cat_file", name, limit_s=5, look=lambda: None)))
"""


@pytest.mark.parametrize(
    ("revision", "quoted"), [("", "main"), ("@v1.0", "v1.0"), ("@refs/convert/parquet", "refs%2Fconvert%2Fparquet")]
)
def test_a_file_has_the_address_that_the_hubs_own_driver_gives_it(
    revision: str, quoted: str, small_shards: Path, tmp_path: Path
) -> None:
    with serving(small_shards, route=hub(small_shards, [], revision=quoted)) as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
        url = f"hf://datasets/owner/waste{revision}/set"
        command = [sys.executable, "-c", _AS_USERS_DO, url, "train-000000.tar"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ours, theirs, size = done.stdout.split()
    assert ours == theirs == f"{server.url}/datasets/owner/waste/resolve/{quoted}/set/train-000000.tar"
    assert int(size) == (small_shards / "train-000000.tar").stat().st_size


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("hf://owner/model/a b", "https://h/owner/model/resolve/main/a%20b/n%25"),
        ("hf://models/owner/model/", "https://h/owner/model/resolve/main/n%25"),
        ("hf://datasets/owner/name@refs/pr/3", "https://h/datasets/owner/name/resolve/refs%2Fpr%2F3/n%25"),
        ("hf://datasets/owner/name@a%2Fb/c", "https://h/datasets/owner/name/resolve/a%2Fb/c/n%25"),
        ("hf://buckets/owner/name/c/d", "https://h/buckets/owner/name/resolve/c/d/n%25"),
    ],
)
def test_hub_addresses(monkeypatch: pytest.MonkeyPatch, url: str, address: str) -> None:
    use_hub(monkeypatch, "https://h")
    assert filesystems.open_store(url, 5.0).path_of("n%") == address


def test_what_is_no_folder_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOBODY)
    for url in ("hf://datasets/name", "hf://name", "hf://"):
        with pytest.raises(SettingsError, match="is not a folder of the Hugging Face hub"):
            filesystems.open_store(url, 5.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        filesystems.open_store(HUB_URL, 5.0)


def test_a_driver_that_hangs_has_our_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not asynchronous: fsspec's memory, for once slow."""
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "cat_file", lambda *args, **limits: time.sleep(3))
    folder = remote.RemoteFolder("memory://set", remote.Patience(0.1, 1))
    with pytest.raises(
        RemoteError, match=r"memory://set/a cannot be read \(attempt 1 of 1\): TimeoutError: no complete"
    ):
        folder.read("a")
    monkeypatch.undo()
    with pytest.raises(DamagedShardError):
        folder.read("a")
