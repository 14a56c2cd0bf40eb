"""Targets of what comes over the network or from another program: requests to the server, and an ONNX file."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from pictures import jpeg
from small_run import BINS, CARD, CLASSES, random_weights

from wasteddp import cli
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.decisions.thresholds import ErrorThreshold
from wasteddp.inference import onnx_classifier
from wasteddp.inference.bundle import read_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.serve.app import create_app
from wasteddp.serve.batches import Batches, Limits
from wasteddp.serve.kept import ROWS, KeptPhotos
from wasteddp.serve.metrics import Metrics

from .target import Target

_POLICY = Policy(BinRules.of_map(BINS, CLASSES), ErrorThreshold(0.6, 0.05, 0.95, 0.04, 50, 40, 0))
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*")  # what h11 accepts
_REFUSED = (400, 401, 403, 404, 405, 413, 422, 429)


def network_targets(folder: Path) -> list[Target]:
    """Write intact files below `folder`, and return their targets."""
    folder.mkdir(parents=True)
    save_bundle(folder / "model", CARD, random_weights())
    (folder / "photo.jpg").write_bytes(jpeg(3, size=(24, 20)))
    targets = [*_requests(folder), _kept(folder)]
    return targets + ([_onnx(folder)] if _write_onnx(folder / "model.onnx") else [])


def _requests(folder: Path) -> list[Target]:
    """Requests to the application, without a socket: of the bytes of an image, and of a form with two."""
    photos = [jpeg(seed, size=(24, 20)) for seed in (1, 2)]
    form = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="images"; filename="%d.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n%s\r\n" % (number, data)
        for number, data in enumerate(photos)
    )
    form += b'--edge\r\nContent-Disposition: form-data; name="note"\r\n\r\ntext\r\n--edge--\r\n'
    begin = b"POST /predict HTTP/1.1\nHost: localhost\nAuthorization: Bearer secret\n"
    sizes = [b"Content-Length: %d\n" % len(body) for body in (photos[0], form)]
    (folder / "image.http").write_bytes(begin + sizes[0] + b"Content-Type: image/jpeg\n\n" + photos[0])
    kind = b'Content-Type: multipart/form-data; boundary="edge"\n\n'
    (folder / "form.http").write_bytes(begin + sizes[1] + kind + form)
    classifier = Classifier.load(folder / "model", device="cpu", batch_size=4)  # once: it has no threads
    card = read_card(folder / "model")

    def ask(request: bytes, token: str) -> int:
        limits = Limits(request_bytes=1 << 20, images=16, request_s=15.0)
        with closing(Batches(classifier, limits, policy=_POLICY)) as batches:
            app = create_app(batches, card, limits, Metrics(), token=token, hosts=frozenset())
            status, answer = asyncio.run(_ask(app, request))
        body = json.loads(answer) if answer.startswith(b"{") else {"error": answer.decode()}
        if status == 200:
            return 0
        assert status in _REFUSED, (status, answer)
        if status != 400:  # that nobody reads
            assert body["error"].strip(), (status, answer)
            assert body["error"].isprintable(), (status, answer)
        print(status, body.get("error"))
        return 2

    return [
        Target("request with an image", folder, "image.http", lambda copy: ask((copy / "image.http").read_bytes(), "")),
        Target("request with a form", folder, "form.http", lambda copy: ask((copy / "form.http").read_bytes(), "")),
        Target("request with a token", folder, "form.http",
               lambda copy: ask((copy / "form.http").read_bytes(), "secret")),
    ]  # fmt: skip


async def _ask(app: Any, request: bytes) -> tuple[int, bytes]:
    """Give a request to the application as uvicorn does, its body in pieces. Return the status and the answer."""
    head, _, body = request.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, rest = first.partition(b" ")
    target = rest.partition(b" ")[0]
    path, _, query = target.partition(b"?")
    found = [match for line in lines if (match := _HEADER.fullmatch(line))]
    draw = random.Random(len(request))
    ends = sorted({draw.randrange(len(body) + 1) for _ in range(3)} | {len(body)})
    pieces = [body[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method.decode("latin-1").upper(),
        "scheme": "http", "path": path.decode("latin-1"), "raw_path": path, "query_string": query, "root_path": "",
        "headers": [(match[1].lower(), match[2]) for match in found], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], answer


def _kept(folder: Path) -> Target:
    (folder / "kept").mkdir()
    rows = [{"path": f"{number:064x}.jpg", "bytes": 9, "model": "0" * 64, "class": "glass"} for number in range(3)]
    (folder / "kept" / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(copy: Path) -> None:
        with closing(KeptPhotos(copy / "kept", policy=None, below=0.9, most_bytes=1000, card=CARD)):
            pass

    return Target("rows of kept photos", folder, f"kept/{ROWS}", read)


def _write_onnx(path: Path) -> bool:
    """Write a small network with a card and a policy. Return False if onnx or onnxruntime is not installed."""
    try:
        import onnxruntime  # noqa: F401
        from onnx import TensorProto, helper, save
    except ImportError:
        return False
    side, weights = CARD.preprocessing.image_size_px, np.random.default_rng(0).normal(size=(3, len(CLASSES)))
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["features"], keepdims=0),
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", side, side, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("probabilities", len(CLASSES)), ("logits", len(CLASSES)), ("features", 3))
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.astype(np.float32).tobytes(), raw=True),
    ]
    graph = helper.make_graph(nodes, "small", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, onnx_classifier.metadata_of(CARD, _POLICY))
    save(model, str(path))
    return True


def _onnx(folder: Path) -> Target:
    def read(copy: Path) -> int:
        return cli.main(["predict", str(copy / "model.onnx"), str(copy / "photo.jpg"), "--csv", str(copy / "out.csv")])

    return Target("onnx", folder, "model.onnx", read)
