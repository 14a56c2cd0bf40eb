"""`wasteddp serve`: run the HTTP interface with uvicorn until SIGINT or SIGTERM, and finish what was taken."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from wasteddp.errors import LaunchError, SettingsError, missing_extra, print_line, print_warning
from wasteddp.files import read_text
from wasteddp.inference.any_classifier import load_classifier
from wasteddp.inference.policy_files import load_policy
from wasteddp.serve.batches import Batches, Limits
from wasteddp.serve.kept import KeptPhotos
from wasteddp.serve.metrics import Metrics

TOKEN_VARIABLE = "WASTEDDP_TOKEN"


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    allow_host: Iterable[str] = (),
    policy: Path | None = None,
    keep_doubtful: Path | None = None,
    keep_below: float = 0.0,
    keep_mb: int = 1000,
    limits: Limits = Limits(),  # noqa: B008, frozen
    batch_size: int | None = None,
    device: str = "auto",
    tta: str = "none",
) -> None:
    """Serve a model.

    Args:
        port: 0: a free one, which is printed.
        token_file: with the token that requests must have; None: that of WASTEDDP_TOKEN, or none is needed.
        allow_host: names by which requests without a token may call the server. If none is given, only addresses and
            `localhost` can be used on a loopback address, and any name on others.
        keep_doubtful: folder for photos that a person should look at; None: nothing is written.
        keep_below: photos whose class has a smaller probability are kept as well.
        keep_mb: limit of that folder's size.
        model, policy, batch_size, device, tta: as `predict_files` takes them.

    Raises:
        LaunchError: packages are missing, or the address cannot be used.
        SettingsError: the token is empty, or see `KeptPhotos`.
    """
    try:
        import uvicorn  # noqa: F401, only checks that it is installed

        from wasteddp.serve.app import create_app
    except ImportError as error:
        raise missing_extra("serve", "wasteddp serve") from error
    if keep_below and keep_doubtful is None:
        raise SettingsError(
            "--keep-below is given without --keep-doubtful", "no photo would be kept", "add --keep-doubtful FOLDER"
        )
    token = read_token(token_file)
    classifier = load_classifier(model, device=device, batch_size=batch_size, tta=tta)
    rules = load_policy(policy, classifier.card, tta=tta) if policy else classifier.policy
    metrics = Metrics()
    with ExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        keep: KeptPhotos | None = None
        if keep_doubtful is not None:
            keep = KeptPhotos(
                keep_doubtful, policy=rules, below=keep_below, most_bytes=keep_mb * 1_000_000, card=classifier.card
            )
            stack.enter_context(closing(keep))
        batches = stack.enter_context(closing(Batches(classifier, limits, policy=rules)))
        is_local = _is_loopback(listening.getsockname()[0])
        hosts = frozenset(map(str.lower, allow_host))
        known = hosts if is_local or hosts else None
        app = create_app(batches, classifier.card, limits, metrics, token=token, hosts=known, keep=keep)
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # warnings that any client can cause
        server = uvicorn_server(app, limits, metrics)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises its signal again after it has ended
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        if not token and not is_local:
            print_warning(f"{host} can be reached from other machines, and no token is set: see --token-file")
        address = f"[{host}]" if ":" in host else host
        print_line(f"serving {model} on http://{address}:{listening.getsockname()[1]}/ until Ctrl-C or SIGTERM")
        server.run(sockets=[listening])
    print_line(f"{metrics.num_requests:,} requests, {metrics.num_answered:,} images answered")
    if keep:
        print_line(str(keep))


def uvicorn_server(app: Any, limits: Limits, metrics: Metrics) -> Any:
    """Return uvicorn's server of an application, with bounds of its connections."""
    import uvicorn

    from wasteddp.serve.connections import bounded

    config = uvicorn.Config(
        app,
        http=bounded(limits, metrics),
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(limits.request_s) + 1,  # a client may read nothing
    )
    return uvicorn.Server(config)


def read_token(path: Path | None) -> str:
    """Return the token of a file, or of WASTEDDP_TOKEN; '' if neither is given.

    Raises:
        SettingsError: it is empty, or a header cannot have it.
    """
    if path is None and TOKEN_VARIABLE not in os.environ:
        return ""
    token = (os.environ[TOKEN_VARIABLE] if path is None else read_text(path, "reading the token")).strip()
    if not token:
        raise SettingsError(
            f"{path or TOKEN_VARIABLE} has no token",
            "everybody who reaches the server could use it",
            "write one, for example of: openssl rand -hex 32",
        )
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise SettingsError(
            f"the token in {path or TOKEN_VARIABLE} has spaces, several lines or characters that are not ASCII",
            "no request could have it in a header",
            "write another one, for example of: openssl rand -hex 32",
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        LaunchError: the address cannot be used.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"{host}, port {port}, cannot be listened on: {error}",
            "the server cannot start",
            "name another --port (0: a free one) or --host",
        ) from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
