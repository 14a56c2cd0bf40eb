"""The command export: a model for other programs and runtimes."""

from __future__ import annotations

import argparse

from wasteddp.commands.arguments import Commands, keywords, positive, to_path
from wasteddp.files import expand_home


def add(commands: Commands) -> None:
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
