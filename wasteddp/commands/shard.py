"""The command `shard`: write images to a shard set."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from wasteddp.commands.arguments import Commands, add_workers, numbers, to_path
from wasteddp.errors import SourceError
from wasteddp.redaction import redacted

if TYPE_CHECKING:
    from wasteddp.sharding.build import Job, Options
    from wasteddp.sharding.corrections import Corrections

_NOT_OF_A_RECIPE = ("split_files", "bins", "classes", "class_folders", "ignore", "encoding")


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "shard",
        help="write images to a shard set",
        description="Writes the images of a folder of class folders, a zip or tar of one, a CSV (path,label[,split]) "
        "or a recipe (.yaml) to WebDataset tars with a manifest. After an interruption, the same command continues.",
    )
    command.add_argument("source", metavar="SOURCE", type=_source, help="folder, zip, tar, CSV or recipe")
    command.add_argument(
        "--out", type=to_path, metavar="FOLDER", help="folder of the new shard set (a recipe has its own)"
    )
    command.add_argument(
        "--from",
        dest="local",
        type=to_path,
        metavar="PATH",
        help="local copy of a recipe's images, instead of a download",
    )
    split = command.add_argument_group("splits")
    split.add_argument("--fractions", type=numbers, metavar="TRAIN,VAL,TEST", help="default: 0.7,0.15,0.15")
    split.add_argument(
        "--split-seed", type=int, default=0, metavar="S", help="seed of the split (default: %(default)s)"
    )
    split.add_argument(
        "--split-files", nargs="+", default=(), metavar="FILE", help="folder of list files, or train=F val=F test=F"
    )
    split.add_argument(
        "--split-rule",
        choices=("stratified", "hash"),
        help="stratified: each class has its fractions; hash: new images never move old ones (default: stratified, "
        "or the rule of the set or recipe that is there)",
    )
    split.add_argument(
        "--extend",
        type=to_path,
        metavar="SET",
        help="the images of this set keep their splits, new ones fill them up: for a set with added images",
    )
    split.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="K",
        help="K folds for cross-validation instead of train and val (wasteddp folds); --fractions 1,0,0: without test",
    )
    group = command.add_argument_group("groups, such as sites, cameras, sessions or objects; none is in two splits")
    group.add_argument("--group-column", default="", metavar="NAME", help="column of the CSV that names the group")
    group.add_argument(
        "--group-level",
        type=int,
        default=0,
        metavar="N",
        help="folder that names the group: 1 is the outermost, -1 the innermost",
    )
    group.add_argument(
        "--group-pattern",
        default="",
        metavar="REGEX",
        help="part of the path that names the group, such as '(?P<camera>cam[0-9]+)'",
    )
    group.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="GROUP",
        help="test split: all images of this group, as B or site=B; may be repeated",
    )
    split.add_argument(
        "--least-per-class", type=int, default=0, metavar="N", help="refuse a split with fewer images of a class"
    )
    split.add_argument(
        "--group-near-duplicates",
        action=argparse.BooleanOptionalAction,
        help="keep near-duplicates in one split (default with the rule stratified)",
    )
    split.add_argument(
        "--near-duplicate-distance", type=int, metavar="BITS", help="differing bits of 64 (default: 8; 0 to 11)"
    )
    split.add_argument(
        "--keep-conflicts", action="store_true", help="keep one of identical images with different labels"
    )
    images = command.add_argument_group("images")
    images.add_argument(
        "--max-side", dest="max_side_px", type=int, metavar="PX", help="shrink images with a longer side"
    )
    images.add_argument("--quality", type=int, metavar="Q", help="quality of re-encoded JPEGs (default: 95)")
    images.add_argument("--shard-mb", type=float, metavar="MB", help="size of a tar (default: 256)")
    images.add_argument(
        "--classes-from",
        type=to_path,
        metavar="RUN-or-SET",
        help="the classes of a run or shard set, in their order; some may have no image (then also --fractions 0,0,1: "
        "all images in test, to evaluate a model on them)",
    )
    images.add_argument(
        "--corrections",
        type=to_path,
        metavar="FILE",
        help="CSV `path,class[,action]`: other labels of images, or `drop`",
    )
    images.add_argument("--bins", type=to_path, metavar="FILE", help="YAML of `class: bin`, the bin of each class")
    names = command.add_argument_group("names")
    names.add_argument(
        "--classes", type=to_path, metavar="FILE", help="YAML of `class: new name`; two with one new name are merged"
    )
    names.add_argument(
        "--class-folders",
        choices=("outer", "inner"),
        default="",
        help="which folders are the classes, if each outer folder holds the same inner folders (site/class: inner)",
    )
    names.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="ignore files and folders with such names, besides hidden ones, __MACOSX and @eaDir",
    )
    names.add_argument("--encoding", default="", help="of the names in an archive that is not UTF-8: cp932, gbk, cp437")
    images.add_argument(
        "--max-left-out",
        type=float,
        metavar="LIMIT",
        help="stop if more images are unusable: a fraction below 1 or a number (default: a tenth, but at least 10)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a set of other images or options")
    several = command.add_argument_group("several machines (see slurm/shard.sh)")
    several.add_argument("--part", metavar="I/N", help="process this part; at the end, run without it")
    several.add_argument(
        "--stage", choices=("read", "write"), help="stage of a part: write only after all parts have read"
    )
    add_workers(command)
    command.set_defaults(run=_shard)


def _shard(arguments: argparse.Namespace) -> None:
    from wasteddp.data.summary import summarise
    from wasteddp.parallel import num_usable_cores
    from wasteddp.sharding import array_job, build, recipe

    workers = arguments.workers or num_usable_cores()
    if arguments.part or arguments.stage:
        part = array_job.Part.parse(arguments.part or "")
        if not arguments.stage or arguments.overwrite:
            raise SourceError(
                "--part was given without --stage, or with --overwrite",
                "the parts would not belong to one set",
                "give --stage read, and after all parts have read, --stage write; remove an old set yourself",
            )
        make_part = {"read": array_job.read_part, "write": array_job.write_part}[arguments.stage]
        make_part(_shard_job(arguments), part, workers=workers)
        return
    if _is_recipe(arguments.source):
        _refuse_own_split(arguments)
        options = _shard_options(arguments)
        local, out = arguments.local, arguments.out
        manifest = recipe.make_recipe(
            arguments.source,
            out=out,
            local=local,
            options=options,
            workers=workers,
            overwrite=arguments.overwrite,
            corrections=_corrections(arguments),
        )
    else:
        manifest = build.make_shards(_shard_job(arguments), workers=workers, overwrite=arguments.overwrite)
    print(summarise(manifest))


def _shard_options(arguments: argparse.Namespace) -> Options:
    from wasteddp.sharding import build

    given = {field.name: getattr(arguments, field.name) for field in fields(build.Options)}
    given["leave_out"] = tuple(arguments.leave_out)
    return build.Options(**{name: value for name, value in given.items() if value is not None})


def _shard_job(arguments: argparse.Namespace) -> Job:
    """Return the sharding job of local images."""
    from wasteddp.data.manifest import Manifest
    from wasteddp.sharding import build, recipe, splits

    options = _shard_options(arguments)
    if _is_recipe(arguments.source):
        _refuse_own_split(arguments)
        return recipe.local_job(
            arguments.source,
            out=arguments.out,
            local=arguments.local,
            options=options,
            corrections=_corrections(arguments),
        )
    if arguments.out is None or arguments.local is not None:
        raise SourceError(
            "--out is missing, or --from was given without a recipe",
            "the folder of the new set is unknown",
            f"wasteddp shard {arguments.source} --out shards/NAME",
        )
    return build.Job(
        source=arguments.source,
        out=arguments.out,
        options=options,
        classes=_classes_of(arguments.classes_from) if arguments.classes_from else (),
        extends=Manifest.load(arguments.extend) if arguments.extend else None,
        may_lack_classes=bool(arguments.classes_from),
        bins=recipe.load_pairs(arguments.bins, "bin") if arguments.bins else {},
        class_names=recipe.load_pairs(arguments.classes, "name") if arguments.classes else {},
        class_folders=arguments.class_folders,
        ignore=tuple(arguments.ignore),
        encoding=arguments.encoding,
        corrections=_corrections(arguments),
        split_files=splits.parse_split_files(arguments.split_files) if arguments.split_files else {},
    )


def _corrections(arguments: argparse.Namespace) -> Corrections | None:
    from wasteddp.sharding.corrections import read_corrections

    return read_corrections(arguments.corrections) if arguments.corrections else None


def _classes_of(run_or_set: Path) -> tuple[str, ...]:
    from wasteddp.data.manifest import MANIFEST_NAME, Manifest

    if (run_or_set / MANIFEST_NAME).exists():
        return Manifest.load(run_or_set).classes
    from wasteddp.inference.bundle import find_bundle, read_card

    return read_card(find_bundle(run_or_set)).classes


def _source(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{redacted(text)} is a URL, and images are read from this machine: download it first, or write a recipe "
            "(shards/README.md) that does; for a shard set behind a URL, set data.shards to it"
        )
    return to_path(text)


def _is_recipe(source: Path) -> bool:
    return source.suffix.lower() in (".yaml", ".yml")


def _refuse_own_split(arguments: argparse.Namespace) -> None:
    given = [name for name in _NOT_OF_A_RECIPE if getattr(arguments, name)]
    if given:
        raise SourceError(
            f"--{given[0].replace('_', '-')} was given with a recipe",
            "the recipe has its own splits, bins and classes, and knows its files",
            "change them in a copy of the recipe, or give the folder or archive instead of the recipe",
        )
