"""Files behind a URL: what is tried again, what is not, and how it is said."""

from __future__ import annotations

import hashlib
import io
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from faulty_server import Answer, Fault, FaultyServer, serving

from wasteddp.data.remote import folder as remote
from wasteddp.data.remote import web
from wasteddp.data.remote.filesystems import hide_secrets
from wasteddp.data.remote.folder import Patience, RemoteFolder, is_url
from wasteddp.errors import DamagedShardError, RemoteError, SettingsError, StoppedError

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "train 1%.tar"


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE_BYTES", 3000)  # CONTENT takes four


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[FaultyServer]:
    (tmp_path / NAME).write_bytes(CONTENT)
    with serving(tmp_path, ranges=request.param) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def folder(server: FaultyServer, waits: list[float]) -> Iterator[RemoteFolder]:
    opened = RemoteFolder(f"{server.url}/", Patience(1.0, attempts=3), wait=waits.append)
    yield opened
    opened.close()


def copied(folder: RemoteFolder, *, num_bytes: int = len(CONTENT), sha256: str = SHA256) -> bytes:
    file = io.BytesIO()
    found = folder.copy(NAME, num_bytes, sha256, file)
    assert found == hashlib.sha256(file.getvalue()).hexdigest()
    return file.getvalue()


def once(fault: Fault) -> Callable[[str, int], Fault | None]:
    """The fault in the first request."""
    left = [fault]
    return lambda name, number: left.pop() if left else None


def test_a_file_comes_in_ranges_or_whole(folder: RemoteFolder, server: FaultyServer, waits: list[float]) -> None:
    assert copied(folder) == folder.read(NAME) == CONTENT
    assert waits == []
    # a store without ranges is asked once for all, not once for each range
    assert sum(server.bytes_sent.values()) == 2 * len(CONTENT)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "reset", "stall", "flip"])
def test_what_may_pass_is_tried_again(
    folder: RemoteFolder, server: FaultyServer, waits: list[float], fault: Fault
) -> None:
    server.faults = once(fault)
    assert copied(folder) == CONTENT
    assert len(waits) == (0 if fault == "flip" else 1)  # wrong bytes are fetched again at once


@pytest.mark.parametrize(
    ("fault", "why"),
    [("500", "500 Internal Server Error"), ("cut", "ClientPayloadError"), ("stall", "Timeout")],
)
def test_what_does_not_pass_is_named_with_url_byte_and_attempt(
    server: FaultyServer, waits: list[float], fault: Fault, why: str
) -> None:
    server.faults = lambda name, number: fault
    limit_s = 0.2 if fault == "stall" else 5.0
    folder = RemoteFolder(f"{server.url}/", Patience(limit_s, attempts=3), wait=waits.append)
    with pytest.raises(RemoteError) as caught:
        copied(folder)
    assert caught.value.found.startswith(f"{server.url}/{NAME} cannot be read at byte 0 of 10,240 (attempt 3 of 3): ")
    assert why in caught.value.found
    assert "continues from the newest checkpoint" in caught.value.remedy
    assert len(waits) == 2
    folder.close()


def test_a_range_that_came_is_not_fetched_again(tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    with serving(tmp_path) as server:
        folder = RemoteFolder(server.url, Patience(1.0, attempts=2), wait=waits.append)
        requests = 0

        def every_other(name: str, number: int) -> Fault | None:
            nonlocal requests
            requests += 1
            return "502" if requests % 2 else None

        server.faults = every_other
        assert copied(folder) == CONTENT
        assert len(waits) == requests / 2 == 4
        assert sum(server.bytes_sent.values()) == len(CONTENT)
        folder.close()


@pytest.mark.parametrize(("status", "error"), [("404", DamagedShardError), ("403", RemoteError), ("401", RemoteError)])
def test_a_definite_answer_of_the_store_is_not_requested_again(
    folder: RemoteFolder, server: FaultyServer, waits: list[float], status: str, error: type[Exception]
) -> None:
    server.faults = lambda name, number: status
    with pytest.raises(error, match=rf"at byte 0 of 10,240 \(attempt 1 of 3\): {status} "):
        copied(folder)
    assert waits == []


def test_a_file_of_another_size_is_named(folder: RemoteFolder, waits: list[float]) -> None:
    for wrong in (len(CONTENT) + 1, len(CONTENT) + 3000, 10 * len(CONTENT)):
        with pytest.raises(DamagedShardError, match=rf"it has 10,240 bytes instead of {wrong:,}|ends before"):
            copied(folder, num_bytes=wrong)
    assert waits == []


def test_no_more_is_read_than_the_file_can_have(
    folder: RemoteFolder, server: FaultyServer, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = lambda name, number: "endless"
    with pytest.raises(DamagedShardError, match=r"it has [\d,]+ bytes instead of 10,240"):
        copied(folder)
    assert sum(server.bytes_sent.values()) < 20e6
    monkeypatch.setattr(web, "_MOST_BYTES", 100_000)
    with pytest.raises(DamagedShardError, match="bytes instead of 100,000"):
        folder.read(NAME)
    assert waits == []


def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret = tmp_path / "key.pem"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, secret)

    def route(asked: str, headers: object) -> str | Answer:
        return Answer(302, b"", {"Location": f"{server.url}/a"}) if asked == "/away" else "a"

    (tmp_path / "a").write_bytes(b"x")
    with serving(tmp_path) as server, serving(tmp_path, route=route, tls=tls) as safe:
        done = subprocess.run(
            [sys.executable, "-c", _READ_TWO, f"https://localhost:{safe.server_port}"],
            env=os.environ | {"SSL_CERT_FILE": str(certificate)},  # read at the start of a process
            capture_output=True,
            text=True,
            check=False,
        )
        assert server.asked == {}
    assert done.stdout.startswith("b'x'\nRemoteError https://localhost:"), done.stderr
    assert "(attempt 1 of 3): the server redirects from https to http" in done.stdout


_READ_TWO = """
import sys
from wasteddp.data.remote.folder import Patience, RemoteFolder
from wasteddp.errors import RemoteError
folder = RemoteFolder(sys.argv[1], Patience(5.0, 3))
print(folder.read("a"))
try:
    print(folder.read("away"))
except RemoteError as error:
    print("RemoteError", error.found)
"""


def test_bytes_of_another_hash_are_fetched_three_times(folder: RemoteFolder, server: FaultyServer) -> None:
    assert copied(folder, sha256="0" * 64) == CONTENT
    assert list(server.asked.values()) == [3]


def test_a_server_that_is_gone_is_named(tmp_path: Path, waits: list[float]) -> None:
    with serving(tmp_path) as server:
        folder = RemoteFolder(server.url, Patience(1.0, attempts=2), wait=waits.append)
    with pytest.raises(RemoteError, match=r"manifest.json cannot be read \(attempt 2 of 2\): ClientConnectorError"):
        folder.read("manifest.json")
    folder.close()


def test_closing_ends_a_read_that_waits(folder: RemoteFolder, server: FaultyServer) -> None:
    def stall_and_close(name: str, number: int) -> Fault:
        folder.close()
        return "stall"

    server.faults = stall_and_close
    with pytest.raises(RemoteError, match="was closed meanwhile"):
        copied(folder)


@pytest.mark.parametrize("fault", ["stall", "500"], ids=["for an answer", "between two attempts"])
def test_a_wait_ends_when_it_is_to_stop(server: FaultyServer, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 60.0)
    folder = RemoteFolder(server.url, Patience(60.0, attempts=3))
    asked = threading.Event()

    def fail(name: str, number: int) -> Fault:
        threading.Timer(0.3, asked.set).start()
        return fault

    server.faults = fail
    began = time.monotonic()
    with pytest.raises(StoppedError, match=r"cannot be read at byte 0 of 10,240: the run was asked to stop"):
        folder.copy(NAME, len(CONTENT), SHA256, io.BytesIO(), stopped=asked.is_set)
    assert 0.2 < time.monotonic() - began < 5
    server.faults = lambda name, number: None
    assert copied(folder) == CONTENT  # who does not ask to stop is served as before
    folder.close()


def test_waits_grow_and_differ_between_ranks_and_are_the_same_in_every_run() -> None:
    waits = [Patience(rank=0).wait_s("http://a/b", 0, attempt) for attempt in range(1, 12)]
    assert waits == [Patience(rank=0).wait_s("http://a/b", 0, attempt) for attempt in range(1, 12)]
    for attempt, wait in enumerate(waits, start=1):
        assert 0.5 <= wait / min(30, 0.5 * 2 ** (attempt - 1)) <= 1.5
    assert all(one != other for one, other in pairwise(waits[:6]))
    assert len({Patience(rank=rank).wait_s("http://a/b", 0, 1) for rank in range(100)}) == 100


def test_passwords_and_signatures_are_sent_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with serving(tmp_path) as server:
        folder = RemoteFolder(f"{server.url}/?sig=secret", Patience(1.0, 1))
        assert folder.read("a") == b"x"
        assert list(server.bytes_sent) == ["/a?sig=secret"]
        with pytest.raises(DamagedShardError) as caught:
            folder.read("b")
        assert "secret" not in str(caught.value)
        folder.close()
    assert hide_secrets("https://user:word@host:1/a/b/?sig=secret") == "https://host:1/a/b"


def test_any_protocol_of_fsspec_is_read(waits: list[float]) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/" + NAME, CONTENT)
    folder = RemoteFolder("memory://set", Patience(1.0, 2), wait=waits.append)
    assert copied(folder) == folder.read(NAME) == CONTENT
    with pytest.raises(DamagedShardError, match=r"memory://set/none cannot be read .* 404 Not Found"):
        folder.read("none")
    with pytest.raises(DamagedShardError, match="it has 10,240 bytes instead of 10,241"):
        copied(folder, num_bytes=len(CONTENT) + 1)
    memory.rm("/set", recursive=True)


def test_a_protocol_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"nosuch://bucket/set cannot be opened: .*nosuch"):
        RemoteFolder("nosuch://bucket/set", Patience())
    assert is_url("s3://bucket/set")
    assert not is_url("shards/mine")
