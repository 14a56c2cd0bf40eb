"""Tars at a URL get the same manifest as tars in a folder, and each is fetched once."""

from __future__ import annotations

import html
import json
import shutil
from email.message import Message
from pathlib import Path

import pytest
from faulty_server import Answer, Fault, FaultyServer, plain, serving
from pictures import jpeg
from store_stubs import GOOGLE_URL, HUB_URL, google, hub
from test_filesystems import use_google, use_hub
from test_index import write_tar

from wasteddp.cli import main
from wasteddp.data import dataset
from wasteddp.data.manifest import Manifest
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote import folder as remote
from wasteddp.errors import RemoteError, SettingsError, ShardError
from wasteddp.settings import Data
from wasteddp.sharding.index import index_folder, index_url

TARS = ("train-000.tar", "train-001.tar", "val 0%.tar")


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of another tool, two of which have a member that belongs to no sample."""
    folder = tmp_path / "tars" / "set"
    for number, name in enumerate(TARS):
        members = {}
        for key in range(4):
            fields = {"label": ("glass", "metal")[key % 2], "url": "https://a"}
            members |= {f"{key}.jpg": jpeg(10 * number + key), f"{key}.json": json.dumps(fields).encode()}
        write_tar(folder / name, {**members, "9.txt": b"x"} if number else members)
    return folder


def lists(asked: str, headers: Message) -> str | Answer:
    """A web server at /set/ that lists the folder, as `python -m http.server` does."""
    name = plain(asked, headers).removeprefix("set/")
    if name:
        return name
    links = "".join(
        f'<li><a href="{html.escape(tar.replace("%", "%25").replace(" ", "%20"))}">x</a></li>' for tar in TARS
    )
    return Answer(
        200,
        f'<a href="../">..</a> <a href="https://elsewhere/a.tar">no</a> {links}'.encode(),
        {"Content-Type": "text/html"},
    )


def lists_nothing(asked: str, headers: Message) -> str | Answer:
    name = plain(asked, headers).removeprefix("set/")
    return name or Answer(404)


@pytest.mark.parametrize("store", ["http", "http without lists", "gs", "hf"])
def test_a_store_gives_the_manifest_of_the_folder_and_sends_each_tar_once(
    store: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Path(shutil.copytree(tars, tmp_path / "local" / "set"))
    expected = index_folder(local, workers=1)
    out = tmp_path / "out"
    routes = {"http": lists, "http without lists": lists_nothing, "gs": google(tars), "hf": hub(tars, [])}
    monkeypatch.setattr(remote, "RANGE_BYTES", 3000)  # a tar takes several requests
    with serving(tars, route=routes[store]) as server:
        if store == "gs":
            use_google(monkeypatch, server.url, tmp_path)
        elif store == "hf":
            use_hub(monkeypatch, server.url)
        url = {"gs": GOOGLE_URL, "hf": HUB_URL}.get(store, f"{server.url}/set")
        names = "{train-{000..001},val 0%}.tar" if store == "http without lists" else ""
        manifest = index_url(url, out, workers=2, tars=names)
        assert server.fetches() == dict.fromkeys(TARS, 1)
        assert manifest.to_json() == expected.to_json()
        written = {"manifest.json", *(name.replace(".tar", ".idx") for name in TARS)}
        assert {path.name for path in out.iterdir()} == written
        for name in written:
            assert (out / name).read_bytes() == (local / name).read_bytes()
            shutil.copy(out / name, tars)
        settings = Data(shards=url, cache=str(tmp_path / "cache"))
        with (
            SplitReader(Manifest.load(local), "train") as one,
            dataset.open_dataset(settings) as shards,
            shards.reader("train") as other,
        ):
            assert [other.read(n) for n in range(other.num_samples)] == [one.read(n) for n in range(one.num_samples)]
        with pytest.raises(ShardError, match=rf"{out} already has a manifest\.json"):
            index_url(url, out, workers=1, tars=names)
        if store in ("gs", "hf"):  # these stores list their files
            with pytest.raises(ShardError, match=rf"{url} already has a manifest\.json"):
                index_url(url, tmp_path / "other", workers=1)


def indexed(server: FaultyServer, tmp_path: Path, *, tars: str = "") -> None:
    index_url(f"{server.url}/set", tmp_path / "out", workers=1, tars=tars, overwrite=True)


def test_a_tar_that_is_cut_is_named_by_its_url_and_nothing_is_written(tars: Path, tmp_path: Path) -> None:
    (tars / TARS[1]).write_bytes((tars / TARS[1]).read_bytes()[:1500])
    with (
        serving(tars, route=lists) as server,
        pytest.raises(ShardError, match=rf"^{server.url}/set/{TARS[1]} is damaged or truncated"),
    ):
        indexed(server, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_may_pass_is_tried_again_and_what_is_missing_is_named(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    faults: list[Fault | None] = ["503", None, "cut", None, "reset"]
    with serving(tars, route=lists) as server:
        server.faults = lambda name, number: faults.pop() if faults else None
        indexed(server, tmp_path)
        assert faults == []
        server.faults = lambda name, number: "503"
        with pytest.raises(RemoteError, match=rf"{TARS[0]} cannot be read at byte 0 of .*attempt 5 of 5\): 503"):
            indexed(server, tmp_path, tars=TARS[0])
        server.faults = lambda name, number: None
        with pytest.raises(ShardError, match=r"none\.tar cannot be read \(attempt 1 of 5\): 404 Not Found"):
            indexed(server, tmp_path, tars="none.tar")


def test_a_store_that_lists_no_tars_names_what_to_give(tars: Path, tmp_path: Path) -> None:
    with serving(tars, route=lists_nothing) as server:
        with pytest.raises(ShardError, match=r"/set cannot be read .*404 Not Found\n(.|\n)*name the tars: --tars"):
            indexed(server, tmp_path)
        with pytest.raises(ShardError, match=r"holds no \*\.tar \(1 other entries\)(.|\n)*name the tars: --tars"):
            indexed(server, tmp_path, tars="../a.tar")
    with pytest.raises(SettingsError, match="nosuch://a cannot be opened"):
        index_url("nosuch://a", tmp_path, workers=1)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_url_and_names_what_to_copy(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "out" / ".indexing-left").mkdir(parents=True)  # by a kill
    with serving(tars, route=lists) as server:
        for wrong in ([f"{server.url}/set"], [str(tars), "--out", out], [str(tars), "--tars", "a.tar"]):
            with pytest.raises(SystemExit, match="2"):
                main(["index", *wrong])
            assert "do: wasteddp index FOLDER, or wasteddp index URL --out FOLDER" in capsys.readouterr().err
        assert main(["index", f"{server.url}/set?sig=secret", "--out", out, "--workers", "1"]) == 0
        said = capsys.readouterr().out
    assert "left by processes that were killed: .indexing-left" in said
    assert not list((tmp_path / "out").glob(".*"))
    assert f"now copy {out}/*.idx and then {out}/manifest.json to {server.url}/set" in said
    assert "secret" not in said
    assert "secret" not in (tmp_path / "out" / "manifest.json").read_text()
