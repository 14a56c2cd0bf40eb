"""The commands for one model: calibrate, features, predict, serve, export."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from wasteddp.commands.arguments import (
    Commands,
    add_compute,
    add_decoders,
    add_run,
    add_tta,
    keywords,
    positive,
    seconds,
    share,
    to_path,
)  # fmt: skip
from wasteddp.files import expand_home


def add_calibrate(commands: Commands) -> None:
    command = commands.add_parser(
        "calibrate",
        help="fit a model's probabilities to a split",
        description="Fits the temperature by which the model's logits are divided (Guo et al. 2017) on a split the "
        "model was not trained on, and keeps it in the model's card, with the calibration error before and after. "
        "The predicted classes stay the same. A training does this with its best model, where val has enough images.",
    )
    add_run(command)
    command.add_argument("--split", default="", help="split to fit on (default: data.eval_split of the run)")
    add_compute(command)
    add_decoders(command)
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.model_additions import add_calibration

    add_calibration(**keywords(arguments))


def add_features(commands: Commands) -> None:
    command = commands.add_parser(
        "features",
        help="add the features of training images to a run's model",
        description="Computes features of at most 1,500 training and 500 validation images and saves their summary in "
        "the model. predict and evaluate then report how unlike the training images an image is. A training does this "
        "at its end; the command is for older models and for averages.",
    )
    add_run(command)
    add_compute(command)
    command.set_defaults(run=_features)


def _features(arguments: argparse.Namespace) -> None:
    from wasteddp.tools.model_additions import add_features

    add_features(**keywords(arguments))


def add_predict(commands: Commands) -> None:
    command = commands.add_parser(
        "predict",
        help="classify images with a trained model",
        description="Classifies images and lists unreadable files at the end. The exit code is 0 if at least one image "
        "was classified, otherwise 2. With --watch, it classifies the photos of a folder as they come, until Ctrl-C or "
        "SIGTERM.",
    )
    command.add_argument(
        "model", metavar="MODEL", type=to_path, help="folder of a run or of its model, or an .onnx file"
    )
    command.add_argument(
        "paths",
        type=expand_home,
        metavar="PATH",
        nargs="+",
        default=(),
        help="image files, folders, or quoted globs (also **); unpack archives first",
    )
    command.add_argument(
        "--watch",
        action=_WatchAction,
        type=to_path,
        metavar="FOLDER",
        help="instead of PATH: answer each photo that is or comes there once, also over restarts; rows are appended to "
        "--csv FILE or --json FILE.jsonl, which show what was answered before",
    )
    command.add_argument(
        "--every",
        type=seconds,
        metavar="S",
        help="with --watch: seconds between two listings; a photo is read once it has not changed between two "
        "(default: 2)",
    )
    command.add_argument(
        "--csv",
        type=to_path,
        metavar="FILE",
        help="write the probabilities of all classes as CSV (UTF-8; in Excel, open it with Data > From Text/CSV)",
    )
    command.add_argument("--json", type=to_path, metavar="FILE", help="the same as JSON")
    command.add_argument(
        "--policy", type=to_path, metavar="FILE", help="policy.json of `evaluate --bins`: decide on a bin or a person"
    )
    command.add_argument("--top", type=positive, default=3, metavar="N", help="classes to print (default: %(default)s)")
    add_compute(command)
    add_decoders(command)
    add_tta(command)
    command.set_defaults(run=partial(_predict, command))


class _WatchAction(argparse.Action):
    """Stores the folder, and makes PATH optional."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "paths":
                action.required = False


def _predict(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    given = keywords(arguments)
    folder, every_s = given.pop("watch"), given.pop("every")
    if folder is None:
        if every_s is not None:
            command.error("--every is only used with --watch")
        from wasteddp.inference.predict import predict_files

        predict_files(**given)
        return
    if given.pop("paths") or given.pop("workers"):
        command.error("--watch takes no PATH and no --workers")
    from wasteddp.inference.watch import EVERY_S, watch_folder

    watch_folder(folder=folder, every_s=every_s or EVERY_S, **given)


def add_serve(commands: Commands) -> None:
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


def add_export(commands: Commands) -> None:
    command = commands.add_parser(
        "export",
        help="write a model for other programs and runtimes: PyTorch, ONNX, OpenVINO, the Hugging Face Hub",
        description="Writes the model into a folder, after it was checked from the image files on: equal pixels, equal "
        "logits within a tolerance, and the same class and decision on images of the shard set. What differs is named, "
        "and nothing is written then. docs/export.md describes each file.",
    )
    command.add_argument("model", metavar="MODEL", type=to_path, help="folder of a run or its model")
    command.add_argument(
        "--to", required=True, choices=("pytorch", "hub", "onnx", "torch-export", "openvino"), help="kind of file"
    )
    command.add_argument("--out", required=True, type=to_path, metavar="DIR", help="folder to write into")
    command.add_argument(
        "--shards", type=expand_home, metavar="FOLDER-OR-URL", help="set to compare on (default: the one trained on)"
    )
    command.add_argument("--split", default="", help="split to compare on (default: the run's data.eval_split)")
    command.add_argument(
        "--images", type=positive, default=64, metavar="N", help="images to compare on (default: %(default)s)"
    )
    command.add_argument(
        "--policy",
        type=to_path,
        metavar="FILE",
        help="policy.json of `evaluate --bins`: compare its decisions, keep it",
    )
    command.add_argument(
        "--int8",
        type=expand_home,
        metavar="SET",
        help="with --to onnx: quantise with training images of this shard set; the change of accuracy and decisions is "
        "measured on its evaluation split",
    )
    command.add_argument(
        "--repo", default="", metavar="USER/NAME", help="with --to hub: upload, with the token in HF_TOKEN"
    )
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from wasteddp.export.export import export_model

    export_model(**keywords(arguments))
