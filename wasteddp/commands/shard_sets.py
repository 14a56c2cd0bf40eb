"""The commands for shard sets: verify, compare, index, draw, plan."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from wasteddp.commands.arguments import Commands, add_workers, integers, to_path, words
from wasteddp.errors import SourceError, inert
from wasteddp.files import expand_home, read_text


def add(commands: Commands) -> None:
    _add_verify(commands)
    _add_compare(commands)
    _add_index(commands)
    _add_draw(commands)
    _add_plan(commands)


def _add_verify(commands: Commands) -> None:
    command = commands.add_parser(
        "verify",
        help="re-read a shard set or a run and name all damage",
        description="Re-reads every byte of a shard set and compares it with the manifest; of a run, all checkpoints, "
        "its models, settings, metrics and evaluations. Exit code 2: damaged.",
    )
    command.add_argument("set", type=expand_home, metavar="FOLDER-OR-URL", help="a shard set, or the folder of a run")
    add_workers(command)
    command.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    from wasteddp.data.remote.filesystems import hide_secrets
    from wasteddp.data.remote.folder import is_url
    from wasteddp.parallel import num_usable_cores
    from wasteddp.sharding.verify import require_whole, verify, verify_remote

    workers = arguments.workers or num_usable_cores()
    remote = is_url(arguments.set)
    if not remote and not (Path(arguments.set) / "manifest.json").exists():
        from wasteddp.tools import verify_run

        if verify_run.is_run(run := Path(arguments.set)):
            found = verify_run.verify_run(run)
            verify_run.require_intact(run, found)
            print(f"{run} is intact: {', '.join(found.checked)}")
            return
    verified = verify_remote(arguments.set, workers=workers) if remote else verify(Path(arguments.set), workers=workers)
    where, counts = (hide_secrets(arguments.set), "") if remote else (arguments.set, ", and label counts")
    require_whole(where, verified)
    print(
        f"{where} is whole: {verified.num_samples:,} samples in {verified.num_shards} shard(s), "
        f"{verified.num_bytes:,} bytes re-read; sizes, sha256 of tars and indexes{counts} match the manifest"
    )
    for line in verified.repeats:
        print(inert(line))


def _add_compare(commands: Commands) -> None:
    command = commands.add_parser(
        "compare",
        help="find the images that two shard sets share",
        description="Prints how many images of each split of the second set are in each split of the first, byte for "
        "byte or nearly, with the first names. Exit code 1: an image of one set's train is in the other's test.",
    )
    command.add_argument("sets", metavar="SET", type=to_path, nargs=2, help="folder of a shard set")
    command.add_argument(
        "--near-duplicate-distance", type=int, default=8, metavar="BITS", help="differing bits of 64 (default: 8)"
    )
    add_workers(command)
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from wasteddp.data.manifest import Manifest
    from wasteddp.parallel import num_usable_cores
    from wasteddp.sharding.compare import compare
    from wasteddp.sharding.job import Options

    distance = arguments.near_duplicate_distance
    Options(near_duplicate_distance=distance).check()
    first, second = (Manifest.load(folder) for folder in arguments.sets)
    found = compare(first, second, workers=arguments.workers or num_usable_cores(), distance=distance)
    print(inert("\n".join(found.lines)) or f"no image of {second.where} is in {first.where}, identical or nearly")
    return int(found.leaks)


def _add_index(commands: Commands) -> None:
    command = commands.add_parser(
        "index",
        help="write a manifest for tars of another tool",
        description="Reads WebDataset or img2dataset tars once and writes an index for each, and a manifest. The split "
        "is a word in a tar's name or its folder (train, val, test); without any such word, all are train. "
        "From a URL, each tar is fetched once and not kept; indexes and manifest are written to --out, to be copied to "
        "the folder of the tars.",
    )
    command.add_argument("folder", type=expand_home, metavar="FOLDER-OR-URL", help="folder of the .tar files")
    command.add_argument("--out", type=to_path, metavar="FOLDER", help="where to write, if the tars are at a URL")
    command.add_argument(
        "--tars", default="", metavar="NAMES", help="train-{000..146}.tar: needed if a web server does not list folders"
    )
    command.add_argument(
        "--classes",
        type=words,
        default=(),
        metavar="A,B,C-or-YAML",
        help="class names in their order, or a YAML file of `label: name`",
    )
    command.add_argument("--classes-from", type=to_path, metavar="FILE", help="the same, one per line")
    command.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="split of the tars that match, such as val='*-validation-*.tar'; the first that matches counts",
    )
    command.add_argument("--label-key", metavar="KEY", help="label field of the .json")
    command.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    add_workers(command)
    command.set_defaults(run=_index)


def _index(arguments: argparse.Namespace) -> None:
    from wasteddp.data.remote.filesystems import hide_secrets
    from wasteddp.data.remote.folder import is_url
    from wasteddp.data.summary import summarise
    from wasteddp.parallel import num_usable_cores
    from wasteddp.sharding import index as indexing
    from wasteddp.sharding.compare import find_repeats
    from wasteddp.sharding.recipe import load_pairs

    classes: tuple[str, ...] = arguments.classes
    class_names: dict[str, str] = {}
    if [Path(name).suffix for name in classes] in ([".yaml"], [".yml"]):
        class_names = load_pairs(Path(classes[0]), "name")
        classes = ()
    if arguments.classes_from:
        lines = read_text(arguments.classes_from, "reading the class names").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
    remote = is_url(arguments.folder)
    if remote != bool(arguments.out) or (arguments.tars and not remote):
        raise SourceError(
            f"{arguments.folder} is a {'URL, without --out' if remote else 'folder, and --out or --tars was given'}",
            "indexes of a folder are written to that folder; a store is only read, so its indexes need a local folder",
            "wasteddp index FOLDER, or wasteddp index URL --out FOLDER",
        )
    index = (
        partial(indexing.index_url, arguments.folder, arguments.out, tars=arguments.tars)
        if remote
        else partial(indexing.index_folder, Path(arguments.folder))
    )
    manifest = index(
        workers=arguments.workers or num_usable_cores(),
        classes=classes,
        class_names=class_names,
        splits=indexing.parse_splits(arguments.split),
        label_keys=(arguments.label_key,) if arguments.label_key else indexing.DEFAULT_LABEL_KEYS,
        overwrite=arguments.overwrite,
    )
    print(summarise(manifest))
    for line in find_repeats(manifest):
        print(inert(line))
    if remote:
        print(
            f"now copy {arguments.out}/*.idx and then {arguments.out}/manifest.json to {hide_secrets(arguments.folder)}"
        )


def _add_draw(commands: Commands) -> None:
    command = commands.add_parser(
        "draw",
        help="draw synthetic waste into a folder of class folders",
        description="Draws images like those of shards/sample.yaml; another seed draws new images.",
    )
    command.add_argument("folder", metavar="FOLDER", type=to_path)
    command.add_argument("--images-per-class", type=int, default=10, metavar="N", help="default: %(default)s")
    command.add_argument("--size", type=int, default=144, metavar="PX", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=1, metavar="S", help="default: %(default)s; the sample set has 0")
    command.set_defaults(run=_draw)


def _draw(arguments: argparse.Namespace) -> None:
    from wasteddp.sharding.sources import synthetic

    count = synthetic.draw_folder(
        arguments.folder,
        kinds=synthetic.KINDS,
        images_per_class=arguments.images_per_class,
        size_px=arguments.size,
        seed=arguments.seed,
    )
    print(f"{count} images of {len(synthetic.KINDS)} classes in {arguments.folder}")


def _add_plan(commands: Commands) -> None:
    command = commands.add_parser(
        "plan",
        help="print the order of samples: steps, shuffle quality, shards per node",
        description="Prints what a training would do with a shard set, without starting it: steps, samples left out, "
        "the quality of the shuffle, and how much of the set each node would fetch if the set were remote.",
    )
    command.add_argument("folder", metavar="FOLDER", type=to_path, help="a shard set")
    command.add_argument("--config", type=expand_home, metavar="YAML", help="default: the default settings")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument(
        "--nodes", type=integers, default=(1, 2, 4, 8), metavar="N,N", help="numbers of nodes (default: 1,2,4,8)"
    )
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from wasteddp import settings as settings_file
    from wasteddp.data.dataset import choose_fold
    from wasteddp.data.manifest import Manifest
    from wasteddp.data.train_plan import preview

    overrides = [*arguments.set, f"data.shards={arguments.folder}"]
    settings = (
        settings_file.load(arguments.config, overrides) if arguments.config else settings_file.parse("", overrides)
    )
    manifest = choose_fold(Manifest.load(arguments.folder), settings.data.fold)
    print(inert(preview(manifest, settings, nodes=arguments.nodes)))
