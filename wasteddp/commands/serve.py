"""The command that serves a model over HTTP: serve."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, add_compute, add_tta, keywords, positive, seconds, share, to_path


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "serve",
        help="answer photos over HTTP, and on a page to try the model",
        description="Serves POST /predict, /healthz, /metrics, /openapi.json and a page at /. Only "
        "--keep-doubtful writes anything. Ctrl-C or SIGTERM ends it after the requests that were taken. "
        "Needs: pip install 'wasteddp[serve]'.",
    )
    command.add_argument(
        "model", metavar="MODEL", type=to_path, help="folder of a run or of its model, or an .onnx file"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    command.add_argument(
        "--token-file",
        type=to_path,
        metavar="FILE",
        help="the header Authorization: Bearer TOKEN must have the token in this file (default: that of "
        "WASTEDDP_TOKEN; without, none is needed)",
    )
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which requests without a token may call the server, for example that of a proxy; may be given "
        "several times (default: on 127.0.0.1 only addresses and localhost, elsewhere any)",
    )
    command.add_argument(
        "--policy", type=to_path, metavar="FILE", help="policy.json of `evaluate --bins`: decide on a bin or a person"
    )
    kept = command.add_argument_group("photos to label")
    kept.add_argument(
        "--keep-doubtful",
        type=to_path,
        metavar="FOLDER",
        help="keep the photos that the policy gives to a person, each once, with its answer in kept.jsonl",
    )
    kept.add_argument(
        "--keep-below",
        type=share,
        default=0.0,
        metavar="P",
        help="keep also those whose class has a probability below P, for example 0.7; needs no policy",
    )
    kept.add_argument(
        "--keep-mb",
        type=positive,
        default=1000,
        metavar="N",
        help="limit of the folder's size; further photos are not kept, and counted (default: %(default)s)",
    )
    limits = command.add_argument_group("limits")
    limits.add_argument("--max-mb", type=positive, default=32, metavar="N", help="of a request (default: %(default)s)")
    limits.add_argument(
        "--max-megapixels", type=positive, default=100, metavar="N", help="of an image (default: %(default)s)"
    )
    limits.add_argument(
        "--max-queue", type=positive, default=128, metavar="N", help="images that wait (default: %(default)s)"
    )
    limits.add_argument(
        "--max-connections",
        type=positive,
        default=512,
        metavar="N",
        help="at the same time, and at most half of the files that the process may open (default: %(default)s)",
    )
    limits.add_argument(
        "--timeout", type=seconds, default=30.0, metavar="S", help="for a request (default: %(default)s)"
    )
    add_compute(command)
    add_tta(command)
    command.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from wasteddp.serve.batches import Limits
    from wasteddp.serve.server import serve

    given = keywords(arguments)
    megabytes, megapixels = given.pop("max_mb"), given.pop("max_megapixels")
    limits = Limits(
        request_bytes=megabytes << 20,
        held_bytes=max(256, megabytes) << 20,
        pixels=megapixels * 1_000_000,
        images=given.pop("max_queue"),
        request_s=given.pop("timeout"),
        connections=given.pop("max_connections"),
    )
    serve(limits=limits, **given)
