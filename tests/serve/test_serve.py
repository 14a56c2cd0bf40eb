"""`wasteddp serve`: answers are those of `predict`; limits, the token, the metrics, and a clean end."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from narrow import __file__ as NARROW
from PIL import Image
from small_run import BINS, CARD, CLASSES, random_weights, write_image

from wasteddp.cli import main
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold
from wasteddp.errors import LaunchError, SettingsError, StorageError
from wasteddp.inference.bundle import read_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.prediction_files import Answer
from wasteddp.serve.app import create_app, page
from wasteddp.serve.batches import Batches, Limits
from wasteddp.serve.kept import KeptPhotos
from wasteddp.serve.metrics import Metrics
from wasteddp.serve.server import listen, read_token, uvicorn_server

POLICY = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.6, 0.05, 0.95, 0.04, 50, 40, 0))
PERSONS = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.9999, 0.05, 0.95, 0.04, 50, 40, 0))
NAME = "<b>é.jpg"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    return [write_image(folder / f"{seed}.jpg", seed) for seed in range(5)]


@pytest.fixture
def classifier(bundle: Path) -> Classifier:
    return Classifier.load(bundle, device="cpu", batch_size=4)


Talk = Callable[[httpx.AsyncClient], Awaitable[Any]]
Serve = Callable[..., Any]


@pytest.fixture
def serve(classifier: Classifier, bundle: Path) -> Serve:
    """Runs requests against a server in this process."""

    def served(talk: Talk, *, limits: Limits | None = None, policy: Policy | None = None, **how: Any) -> Any:
        with closing(Batches(classifier, limits or Limits(), policy=policy)) as batches:
            app = create_app(batches, read_card(bundle), limits or Limits(), Metrics(), **how)

            async def run() -> Any:
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://it") as client:
                    found = await talk(client)
                    assert batches.num_taken == 0
                    return found

            return asyncio.run(run())

    return served


def forms(images: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{number}.jpg", data)) for number, data in enumerate(images)]


def test_answers_are_those_of_predict_in_any_form(
    serve: Serve, bundle: Path, photos: list[Path], tmp_path: Path
) -> None:
    how = ["--device", "cpu", "--batch-size", "4"]  # as the server: another size may give other bits
    main(["predict", str(bundle), *map(str, photos), "--json", str(tmp_path / "out.json"), *how])
    wanted = [
        {name: value for name, value in entry.items() if name != "path"}
        for entry in json.loads((tmp_path / "out.json").read_text())["predictions"]
    ]
    images = [path.read_bytes() for path in photos]

    async def talk(client: httpx.AsyncClient) -> Any:
        raw = await client.post("/predict", content=images[0], headers={"content-type": "image/jpeg"})
        plain = await client.post("/predict", content=images[1])
        many = await client.post("/predict", files=forms(images))
        named = await client.post("/predict", files=[("any", (NAME, images[2])), ("note", (None, b"text"))])
        return raw, plain, many, named

    raw, plain, many, named = serve(talk)
    assert raw.json() == {"model": read_card(bundle).hashes.weights, "answers": [{"name": "", **wanted[0]}]}
    assert plain.json()["answers"] == [{"name": "", **wanted[1]}]
    assert many.json()["answers"] == [{"name": f"{n}.jpg", **one} for n, one in enumerate(wanted)]
    assert named.json()["answers"] == [{"name": NAME, **wanted[2]}]


def test_requests_share_batches_and_a_policy_decides(
    serve: Serve, classifier: Classifier, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = list[int](), classifier.answers
    monkeypatch.setattr(classifier, "answers", lambda views: (sizes.append(len(views)), real(views))[1])

    async def talk(client: httpx.AsyncClient) -> Any:
        sent = (client.post("/predict", content=path.read_bytes()) for path in photos[:4])
        return await asyncio.gather(*sent), await client.get("/metrics")

    found, metrics = serve(talk, limits=Limits(wait_s=60.0), policy=POLICY)  # a full batch does not wait
    assert sizes == [4]
    answers = [response.json()["answers"][0] for response in found]
    assert {answer["decision"] for answer in answers} <= {*BINS.values(), "person"}
    for name, values in (
        ("classes_total{class", [answer["class"] for answer in answers]),
        ("decisions_total{decision", [answer["decision"] for answer in answers]),
    ):
        lines = {f'wasteddp_{name}="{value}"}} {count}' for value, count in Counter(values).items()}
        assert {line for line in metrics.text.splitlines() if line.startswith(f"wasteddp_{name}")} == lines


def test_names_and_unlike_images_in_the_metrics() -> None:
    metrics = Metrics()
    for unlike in (None, 94.9, 95.0, 100.0):
        metrics.count_answer('a "b"\\\n\udc80', None, unlike)
    lines = metrics.text(num_waiting=0, num_batches=0).splitlines()
    assert 'wasteddp_classes_total{class="a \\"b\\"\\\\\\n\\\\udc80"} 4' in lines
    assert "wasteddp_unlike_total 2" in lines


def test_images_that_cannot_be_read_have_an_error_and_the_others_an_answer(serve: Serve, photos: list[Path]) -> None:
    whole = photos[0].read_bytes()

    async def talk(client: httpx.AsyncClient) -> Any:
        mixed = await client.post("/predict", files=forms([whole[:-100], whole, b"text"]))
        bad = [await client.post("/predict", content=data) for data in (b"", b"text\nmore", whole[:-100])]
        broken = [
            await client.post("/predict", content=data, headers={"content-type": f"multipart/form-data{boundary}"})
            for data, boundary in ((b"x", ""), (b"x", "; boundary=a"), (b"--a\r\n\r\nx", "; boundary=a"))
        ]
        return mixed, [*bad, *broken], await client.get("/metrics")

    mixed, refused, metrics = serve(talk)
    assert [(entry["error"] or "")[:9] for entry in mixed.json()["answers"]] == ["truncated", "", "unreadabl"]
    for response in refused:
        assert response.status_code == 422
        assert response.json().keys() == {"error"}
        assert "\n" not in response.json()["error"]
    for line in (
        'wasteddp_requests_total{status="200"} 1',
        'wasteddp_requests_total{status="422"} 6',
        'wasteddp_images_total{result="answered"} 1',
        'wasteddp_images_total{result="unreadable"} 5',
        "wasteddp_images_waiting 0",
        'wasteddp_request_seconds_bucket{le="+Inf"} 7',
        "wasteddp_request_seconds_count 7",
    ):
        assert line in metrics.text.splitlines()


def test_limits_of_bytes_pixels_and_images(serve: Serve, photos: list[Path]) -> None:
    whole = photos[0].read_bytes()

    async def parts() -> Any:
        for _ in range(3):
            yield b"x" * 4000

    async def talk(client: httpx.AsyncClient) -> Any:
        return [
            await client.post("/predict", content=b"x" * 10_001),
            await client.post("/predict", content=parts()),  # without its length
            await client.post("/predict", files=forms([b"", b"", b""])),
            await client.post("/predict", content=whole),
        ]

    large, streamed, many, pixels = serve(talk, limits=Limits(request_bytes=10_000, images=2, pixels=1000))
    assert [response.status_code for response in (large, streamed, many, pixels)] == [413, 413, 413, 422]
    assert "48x40 px; the limit of this server is 1,000 pixels" in pixels.json()["error"]
    held = serve(lambda client: client.post("/predict", content=whole), limits=Limits(held_bytes=10))
    assert held.status_code == 429


def test_a_full_queue_is_429_and_a_late_answer_503(
    serve: Serve, classifier: Classifier, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real = photos[0].read_bytes(), classifier.answers
    is_computing, may_go_on = threading.Event(), threading.Event()

    def answers(views: Any) -> Any:
        is_computing.set()
        may_go_on.wait()
        return real(views)

    monkeypatch.setattr(classifier, "answers", answers)

    async def full(client: httpx.AsyncClient) -> Any:
        first = asyncio.create_task(client.post("/predict", content=data))
        await asyncio.to_thread(is_computing.wait)
        second = await client.post("/predict", content=data)
        may_go_on.set()
        return await first, second

    first, second = serve(full, limits=Limits(images=1))
    assert (first.status_code, second.status_code, second.headers["retry-after"]) == (200, 429, "1")
    may_go_on.clear()

    async def late(client: httpx.AsyncClient) -> Any:
        found = await client.post("/predict", content=data)
        may_go_on.set()
        while "wasteddp_images_waiting 0" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        return found

    found = serve(late, limits=Limits(request_s=0.3))
    assert (found.status_code, found.json()) == (503, {"error": "no answer within 0.3 s; try again later"})


def test_a_model_that_fails_is_500_and_the_next_request_is_answered(
    serve: Serve, classifier: Classifier, photos: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = classifier.answers

    def fail_once(views: Any) -> Any:
        monkeypatch.setattr(classifier, "answers", real)
        raise RuntimeError("of the test")

    monkeypatch.setattr(classifier, "answers", fail_once)

    async def talk(client: httpx.AsyncClient) -> Any:
        return [(await client.post("/predict", content=photos[0].read_bytes())).status_code for _ in range(2)]

    assert serve(talk) == [500, 200]
    assert "RuntimeError('of the test')" in capsys.readouterr().err


def test_a_token_is_needed_if_it_is_set(serve: Serve, photos: list[Path]) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        found = []
        for given in ("", "Bearer wrong", "Bearer sécret", "s3cret", "Basic s3cret", "Bearer s3cret", "bearer  s3cret"):
            headers = {"authorization": given.encode()}
            found.append((await client.post("/predict", content=photos[0].read_bytes(), headers=headers)).status_code)
            found.append((await client.get("/metrics", headers=headers)).status_code)
        return found, (await client.get("/healthz")).text, (await client.get("/")).text

    found, health, html = serve(talk, token="s3cret")
    assert found == [401] * 10 + [200] * 4
    assert health == "ok\n"
    assert '<form id="form"><label>Token' in html


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WASTEDDP_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("WASTEDDP_TOKEN", "a")
    (tmp_path / "token").write_text("b\n")
    assert (read_token(None), read_token(tmp_path / "token")) == ("a", "b")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(SettingsError, match="has no token"):
        read_token(tmp_path / "token")
    for wrong in ("two\nlines", "sécret", "a b"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(SettingsError, match="no request could have it"):
            read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "Plant-PC"}, 200),  # of --allow-host
        ({"host": "evil.example:8000"}, 403),  # a name that leads to 127.0.0.1
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),  # its own page, in a browser without sec-fetch
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ({"host": "localhost:1", "origin": "null"}, 403),
        ({"host": "127.0.0.1", "origin": "https://proxy", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "127.0.0.1", "origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "127.0.0.1", "sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_ask(
    headers: dict[str, str], status: int, serve: Serve, photos: list[Path]
) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        found = await client.post("/predict", content=photos[0].read_bytes(), headers=headers)
        return found.status_code, (await client.get("/metrics", headers=headers)).status_code

    assert serve(talk, hosts=frozenset({"plant-pc"})) == (status, status)


def test_a_form_of_many_parts_a_wrong_path_and_a_long_boundary_are_answered_in_one_line(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    part = b'--a\r\nContent-Disposition: form-data; name="i"{}\r\n\r\n\r\n'
    image, field = part.replace(b"{}", b'; filename="i"'), part.replace(b"{}", b"")

    async def talk(client: httpx.AsyncClient) -> Any:
        form, long = ({"content-type": f"multipart/form-data; boundary={name}"} for name in ("a", "a" * 5000))
        bodies = [image * 3, field * 100_000, field + image * 2]
        return [
            *[await client.post("/predict", content=body + b"--a--\r\n", headers=form) for body in bodies],
            await client.post("/predict", content=b"x", headers=long),
            await client.get("/predict"),
            await client.post("/predict/", headers={"host": "evil.example"}),
        ]

    found = serve(talk, limits=Limits(images=2))
    assert [one.status_code for one in found] == [413, 413, 422, 422, 405, 404]
    assert all(set(one.json()) == {"error"} for one in found)
    assert capsys.readouterr().err == ""


def test_large_images_are_decoded_one_after_another_and_jpegs_together(
    serve: Serve, classifier: Classifier, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lock, now, most = classifier.view, threading.Lock(), 0, 0

    def view(data: bytes) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return real(data)

    monkeypatch.setattr(classifier, "view", view)
    monkeypatch.setattr("wasteddp.serve.batches.num_usable_cores", lambda: 4)
    jpeg = photos[0].read_bytes()
    png = io.BytesIO()
    Image.open(photos[0]).save(png, "PNG")
    for data, together in ((png.getvalue(), 1), (jpeg, 4)):
        most = 0
        files = forms([data] * 4)
        found = serve(lambda client, files=files: client.post("/predict", files=files), limits=Limits(pixels=48 * 40))
        assert (found.status_code, most) == (200, together)


def test_the_interface_is_described_and_the_page_loads_nothing_else(serve: Serve) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        return (await client.get("/openapi.json")).json(), await client.get("/"), await client.get("/docs")

    described, root, docs = serve(talk)
    assert set(described["paths"]) == {"/predict", "/healthz", "/metrics"}
    post = described["paths"]["/predict"]["post"]
    assert {"200", "413", "422", "429", "503"} <= set(post["responses"])
    assert "multipart/form-data" in post["requestBody"]["content"]
    assert "class" in described["components"]["schemas"]["ImageAnswer"]["properties"]
    assert docs.status_code == 404
    assert root.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert root.text == page(needs_token=False, keeps=False)
    assert '<form id="form" hidden><label>Token' in root.text
    assert not re.search(r"https?://|innerHTML|\{(css|js|token_hidden|unlike_from|kept)\}", root.text)


# --- photos to label --------------------------------------------------------------------------------------------------


Keep = Callable[..., KeptPhotos]


@pytest.fixture
def keep(bundle: Path, tmp_path: Path) -> Iterator[Keep]:
    with ExitStack() as stack:

        def started(**how: Any) -> KeptPhotos:
            stack.close()
            how = {"policy": None, "below": 0.0, "most_bytes": 10**6} | how
            return stack.enter_context(closing(KeptPhotos(tmp_path / "kept", card=read_card(bundle), **how)))

        yield started


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]


def test_doubtful_photos_are_kept_once_under_names_of_their_content(
    serve: Serve, classifier: Classifier, photos: list[Path], tmp_path: Path, keep: Keep
) -> None:
    png = io.BytesIO()
    Image.open(photos[4]).save(png, "PNG")
    images = [*(path.read_bytes() for path in photos), png.getvalue()]
    sure = classifier.probabilities([classifier.view(data) for data in images]).max(axis=1)
    below = float(np.sort(sure)[-2])  # two photos are as sure as that or surer
    doubtful = [data for data, one in zip(images, sure, strict=True) if one < below]
    files = [("images", ("../../../etc/passwd.exe", data)) for data in [*images, b"none"]]

    async def talk(client: httpx.AsyncClient) -> Any:
        for _ in range(2):
            found = await client.post("/predict", files=files)
        while (
            "kept" not in (text := (await client.get("/metrics")).text) or f'"repeated"}} {len(doubtful)}' not in text
        ):
            await asyncio.sleep(0.01)
        return found, text, (await client.get("/")).text

    kept = keep(below=below)
    found, metrics, html = serve(talk, keep=kept)
    assert f'wasteddp_doubtful_total{{result="kept"}} {len(doubtful)}' in metrics.splitlines()
    assert "for labelling" in html
    rows, answers = kept_rows(tmp_path / "kept"), [one for one in found.json()["answers"] if not one["error"]]
    by_name = {row["path"]: row for row in rows}
    assert len(by_name) == len(rows) == len(doubtful)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"kept.jsonl", *by_name}
    for data, answer in zip(images, answers, strict=True):
        name = hashlib.sha256(data).hexdigest() + (".png" if data == png.getvalue() else ".jpg")
        assert (name in by_name) == (data in doubtful)
        if row := by_name.get(name):
            assert (tmp_path / "kept" / name).read_bytes() == data
            assert row == {**row, **{key: value for key, value in answer.items() if key != "name"}}
            assert (row["bytes"], row["model"]) == (len(data), found.json()["model"])
            assert abs((datetime.now(UTC) - datetime.fromisoformat(row["time"])).total_seconds()) < 60
    assert str(kept).startswith(f"{len(doubtful)} doubtful photos kept in ")


def test_a_photo_for_a_person_is_kept_and_nothing_is_written_unless_asked(
    serve: Serve, photos: list[Path], tmp_path: Path, keep: Keep
) -> None:
    images = [path.read_bytes() for path in photos]
    serve(lambda client: client.post("/predict", files=forms(images)), policy=POLICY)
    assert not list(tmp_path.iterdir())
    found = serve(
        lambda client: client.post("/predict", files=forms(images)), policy=PERSONS, keep=keep(policy=PERSONS)
    )
    keep(below=0.1).close()  # ends the first
    assert [row["decision"] for row in kept_rows(tmp_path / "kept")] == ["person"] * len(images)
    assert {one["decision"] for one in found.json()["answers"]} == {"person"}
    for how, what in (({}, "no policy asks"), ({"policy": Policy(POLICY.rules)}, "the policy never asks")):
        with pytest.raises(SettingsError, match=what):
            keep(**how)


def test_a_full_folder_and_a_broken_disk_are_counted_and_do_not_end_it(
    photos: list[Path], tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [path.read_bytes() for path in photos]
    answer = Answer("", np.array([0.5, 0.3, 0.2], np.float32))

    def offer(kept: KeptPhotos, *chosen: bytes) -> dict[str, int]:
        for data in chosen:
            kept.offer(data, answer)
        kept.close()
        return dict(kept.counts)

    assert offer(keep(below=0.5), images[0]) == {}
    assert offer(keep(below=0.6), images[0]) == {"kept": 1}
    (tmp_path / "kept" / "kept.jsonl").write_text((tmp_path / "kept" / "kept.jsonl").read_text()[:-5])  # a kill
    half, own = tmp_path / "kept" / f"{'a' * 64}.jpg.tmp", tmp_path / "kept" / "own.tmp"  # another, and a user's file
    half.touch()
    own.touch()
    kept = keep(below=0.6)
    said = capsys.readouterr()
    assert "1 lines cannot be read" in said.err
    assert f"removed 1 photo(s) that a kill left half written: {half.name}" in said.out
    assert not half.exists()
    own.unlink()
    assert offer(kept, images[0]) == {"kept": 1}
    size = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    assert offer(keep(below=0.6, most_bytes=size + 100), *images) == {"repeated": 1, "full": 4}
    assert capsys.readouterr().err.count("the limit is") == 1
    assert len(list((tmp_path / "kept").iterdir())) == 2
    next((tmp_path / "kept").glob("*.jpg")).unlink()  # labelled, and taken away
    monkeypatch.setattr("wasteddp.serve.kept.write_atomically", fail := Mock(side_effect=StorageError("disk broken")))
    assert offer(keep(below=0.6, most_bytes=size + 500), *images[:2]) == {"repeated": 1, "failed": 1}
    assert capsys.readouterr().err.count("disk broken") == fail.call_count == 1
    monkeypatch.setattr("wasteddp.serve.kept._PENDING_BYTES", 1)
    first = keep(below=0.6)
    with first._lock:  # the writer cannot end
        first._pending_bytes = 1
    first.offer(images[2], answer)
    assert first.counts["busy"] == 1
    with pytest.raises(SettingsError, match="another server keeps photos"):
        KeptPhotos(tmp_path / "kept", policy=None, below=0.6, most_bytes=1, card=CARD)


def test_an_address_in_use_is_named(serve: Serve) -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(LaunchError, match="cannot be listened on"):
        listen("127.0.0.1", first.getsockname()[1])


def test_missing_packages_are_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        main(["serve", str(bundle)])
    assert "pip install 'wasteddp[serve]'" in capsys.readouterr().err


@pytest.fixture
def listening(classifier: Classifier, bundle: Path) -> Iterator[tuple[tuple[str, int], Metrics]]:
    """A server with a socket, in a thread, for 3 connections and short times. Yields its address and counts."""
    limits, metrics = Limits(request_s=0.4, header_s=0.2, connections=3), Metrics()
    with closing(Batches(classifier, limits)) as batches, listen("127.0.0.1", 0) as listening:
        server = uvicorn_server(create_app(batches, read_card(bundle), limits, metrics), limits, metrics)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname(), metrics
        server.should_exit = True
        thread.join()


def trickle(address: tuple[str, int], begin: bytes, drop: bytes) -> tuple[bytes, float]:
    """Send a begin, and then drops until the server ends the connection. Return its answer, and after how long."""
    answer, began = b"", time.monotonic()
    with socket.create_connection(address, timeout=0.03) as connection:
        connection.sendall(begin)
        while time.monotonic() < began + 20:
            try:
                if not (part := connection.recv(65536)):
                    break
                answer += part
            except TimeoutError:
                with suppress(OSError):
                    connection.sendall(drop)
            except ConnectionResetError:
                break
    return answer, time.monotonic() - began


def test_slow_clients_are_ended_in_each_stage(
    listening: tuple[tuple[str, int], Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasteddp.serve.connections._GRACE_S", 0.2)
    address, metrics = listening
    post, get = b"POST /predict HTTP/1.1\r\nhost: localhost\r\n", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
    body = b"content-length: 1000\r\n\r\n"
    for begin, drop, status, least_s in (
        (b"", b"", b"", 0.2),  # nothing
        (post, b"", b"408", 0.2),  # half of the headers
        (post + b"x-a: ", b"a", b"408", 0.2),  # headers that never end
        (post + body, b"", b"408", 0.4),  # no body
        (post + body, b"a", b"408", 0.4),  # a body that is too slow
        (post + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"408", 0.4),  # one that never ends
        (get + body, b"a", b"200", 0.2),  # a body that nobody reads
        (get + b"\r\n", b"G", b"200", 0.2),  # a second request that never comes
    ):
        answer, took_s = trickle(address, begin, drop)
        assert answer[9:12] == status, (begin, drop, answer)
        assert least_s <= took_s < 10, (begin, drop)
    lines = metrics.text(num_waiting=0, num_batches=0).splitlines()
    assert 'wasteddp_requests_total{status="408"} 3' in lines
    assert 'wasteddp_connections_closed_total{why="waiting"} 5' in lines
    assert "wasteddp_connections 0" in lines


def test_a_client_that_does_not_read_and_one_connection_too_many_are_ended(
    listening: tuple[tuple[str, int], Metrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasteddp.serve.connections._GRACE_S", 0.2)
    address, metrics = listening
    with ExitStack() as stack:
        others = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(4)]
        answers = [one.makefile("rb").read() for one in others]
    assert sorted(answer[9:12] for answer in answers) == [b"", b"", b"", b"503"]
    with socket.create_connection(address, timeout=0.2) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            while True:
                deaf.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)
        until = time.monotonic() + 10
        while metrics.num_connections and time.monotonic() < until:
            time.sleep(0.02)
    lines = metrics.text(num_waiting=0, num_batches=0).splitlines()
    for why, count in (("too many", 1), ("waiting", 3), ("answering", 1)):
        assert f'wasteddp_connections_closed_total{{why="{why}"}} {count}' in lines


@pytest.fixture
def process(bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, NARROW, "-m", "wasteddp.cli", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        try:
            yield process, found.group()
        finally:
            process.kill()


@pytest.mark.processes
def test_sigterm_ends_it_after_the_request_that_it_reads(
    process: tuple[subprocess.Popen[str], str], photos: list[Path]
) -> None:
    server, address = process
    data = photos[0].read_bytes()

    def slowly() -> Iterator[bytes]:
        yield data[:100]
        server.send_signal(signal.SIGTERM)
        yield data[100:]

    assert httpx.get(f"{address}/healthz").text == "ok\n"
    assert httpx.post(f"{address}/predict", content=slowly()).status_code == 200
    assert server.wait(60) == 0
    assert server.stdout is not None
    assert server.stdout.read() == "1 requests, 1 images answered\n"
