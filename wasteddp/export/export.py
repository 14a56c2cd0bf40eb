"""`wasteddp export`: write a model for other programs and runtimes, after a check that it sees and answers the same.

    DIR/FILE                   the model
    DIR/FILE.parity.json       the check, with the sha256 of FILE; parity.json for the Hub

Everything is written into a temporary folder beside DIR, checked there, and moved only if the check passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from wasteddp import __version__
from wasteddp.data.dataset import ShardSet, open_dataset
from wasteddp.data.decoding.centre import CentreView
from wasteddp.data.decoding.workers import start_workers
from wasteddp.decisions.decide import Policy
from wasteddp.errors import BundleError, SettingsError, print_line, storage
from wasteddp.export import runtimes, weights
from wasteddp.export.parity import MOST_NAMED, U8, Reference, Run, compare_answers, compare_pixels, read_reference
from wasteddp.export.runtimes import Exported
from wasteddp.files import make_folder, sha256_of, sync_file, sync_folder, temporary_folder, write_atomically
from wasteddp.inference.bundle import CARD_NAME, BundleCard, find_bundle, load_bundle, read_card, remove_old
from wasteddp.inference.classifier import Classifier, network_of
from wasteddp.inference.evaluate import check_classes, data_of, evaluate_split
from wasteddp.inference.metrics import percent
from wasteddp.inference.onnx_classifier import OnnxClassifier, metadata_of
from wasteddp.inference.policy_files import load_policy
from wasteddp.settings import Data
from wasteddp.training.features import choose_samples

FORMAT, FORMAT_VERSION = "wasteddp-parity", 1
KINDS = ("pytorch", "hub", "onnx", "torch-export", "openvino")
IMAGES = 64  # compared
_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "pillow", "simplejpeg")

Checked = tuple[Path, dict[str, Any], list[str]]  # the file, the record of its check, what is wrong


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """The model to export."""

    bundle: Path
    card: BundleCard
    weights: Mapping[str, torch.Tensor]
    exported: Exported
    policy: Policy | None

    @property
    def side_px(self) -> int:
        return self.card.preprocessing.image_size_px

    @property
    def metadata(self) -> dict[str, str]:
        return metadata_of(self.card, self.policy)


def export_model(
    model: Path,
    *,
    to: str,
    out: Path,
    shards: str | None = None,
    split: str = "",
    images: int = IMAGES,
    policy: Path | None = None,
    int8: str | None = None,
    repo: str = "",
) -> Path:
    """Export a model, and print what was compared. Return the path of the file.

    Args:
        model: folder of a run or of its model.
        to: one of `KINDS`.
        out: folder; files of the same names in it are replaced.
        shards: folder or URL of the set whose images are compared; None: the one that the model was trained on.
        split: of these images; "": the run's evaluation split.
        images: at most so many are compared.
        policy: policy.json of the model, to compare its decisions and to keep in the file; None: bins are compared.
        int8: with onnx: quantise with training images of this set, and measure the change on its evaluation split.
        repo: with hub: upload the folder to this repository.

    Raises:
        BundleError: there is no model, or the exported one differs from it; nothing is written.
        SettingsError: options that do not go together, no shard set is known, or another model is in the folder.
        LaunchError: a package is missing, or the Hub refuses.
    """
    _refuse_options(to, int8, repo)
    if repo:
        weights.token()
    bundle = find_bundle(model)
    card, state_dict = load_bundle(bundle)
    if to == "hub":
        _refuse_other_bundle(out, card)
    network = network_of(card, state_dict, where=bundle)
    rules = load_policy(policy, card, tta="none") if policy else None
    source = _Source(bundle, card, state_dict, Exported(card, network), rules)
    classifier = Classifier(card, state_dict, device="cpu", where=bundle)
    console = Console(stderr=True)
    run_folder = bundle.parent if (bundle.parent / "settings.yaml").is_file() else model
    data = data_of(run_folder, int8 or shards)
    with open_dataset(data) as shard_set, _staged(out) as folder:
        check_classes(shard_set.manifest, card.classes)
        chosen = split or data.eval_split
        reference = read_reference(classifier, _eager(source.exported), shard_set, chosen, images, rules)
        path, record, wrong = _write(source, to, folder, reference)
        if not wrong and int8 is not None:
            path, change, wrong = _write_int8(source, classifier, path, reference, shard_set, data, console)
            record |= change
        if wrong:
            more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
            raise BundleError(
                f"the exported model differs from {bundle}: {'; '.join(wrong[:MOST_NAMED])}{more}",
                "it would answer otherwise than the model that was measured, so nothing was written",
                "use the versions of launch/constraints.txt; if it still differs, report it with these lines",
            )
        name = "parity.json" if to == "hub" else f"{path.name}.parity.json"
        text = json.dumps(_record(source, to, path, reference, record), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / name, (text + "\n").encode("utf-8", "backslashreplace"))
    if to == "hub":
        remove_old(out, card)
    for line in _lines(reference, record):
        print(line)
    print(f"written: {out / path.name}, and the check beside it: {name}")
    if repo:
        print(f"uploaded: {weights.upload(out, repo, card)}")
    return out / path.name


def _refuse_options(to: str, int8: str | None, repo: str) -> None:
    for given, option, only in ((int8, "--int8", "onnx"), (repo, "--repo", "hub")):
        if given and to != only:
            raise SettingsError(
                f"{option} is given, and --to is {to}", f"only --to {only} has it", f"leave {option} out"
            )


def _refuse_other_bundle(out: Path, card: BundleCard) -> None:
    """Refuse the folder of a run or of another model, which would be replaced. A folder for the Hub may be.

    Raises:
        SettingsError: it is one.
    """
    if (out / "settings.yaml").exists() or (out / "checkpoints").exists():
        what = "is the folder of a run, which would have another model from then on"
    elif not (out / CARD_NAME).exists() or (out / "config.json").exists():
        return
    elif (found := read_card(out).hashes.weights) != card.hashes.weights:
        what = f"holds another model, with the weights {found[:12]}, which would be removed"
    else:
        return
    raise SettingsError(f"{out} {what}", "that model would be lost", "name another folder with --out")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give a temporary folder, whose files are moved into `out` at the end; after an error, nothing is left.

    It is inside `out`, which may be on another disk than its parent. While files are replaced, no record of a check is
    there: after a kill, it could be that of others.
    """
    with storage("writing the exported model", out):
        existed = [folder for folder in (out, *out.parents) if folder.exists()]
        make_folder(out)
    try:
        with temporary_folder(out, ".export-", print_line) as folder:
            yield folder
            with storage("writing the exported model", out):
                *files, record = sorted(folder.iterdir(), key=lambda file: file.name.endswith("parity.json"))
                (out / record.name).unlink(missing_ok=True)
                for file in (*files, record):
                    sync_file(file)
                    sync_folder(out)
                    file.replace(out / file.name)
                sync_folder(out)
    except BaseException:
        for made in (out, *out.parents):
            if made in existed or any(made.iterdir()):
                break
            made.rmdir()
        raise


def _eager(exported: Exported) -> Run:
    def run(images_BHWC: Any) -> Any:
        with torch.inference_mode():
            return tuple(found.numpy() for found in exported(torch.from_numpy(images_BHWC))[:2])

    return run


def _write(source: _Source, to: str, folder: Path, reference: Reference) -> Checked:
    if to == "pytorch":
        path = weights.write_pytorch(source.card, source.weights, folder)
        return path, *weights.check_pytorch(source.card, path, reference)
    if to == "hub":
        path = weights.write_hub(source.bundle, source.card, source.weights, folder)
        return path, *weights.check_hub(source.card, path, reference)
    if to == "torch-export":
        path = runtimes.write_torch_export(source.exported, source.side_px, folder / "model.pt2", source.metadata)
        return _check(path, runtimes.run_torch_export, source, reference)
    path = runtimes.write_onnx(source.exported, source.side_px, folder / "model.onnx", source.metadata)
    if to == "openvino":
        onnx, path = path, runtimes.write_openvino(path, folder / "model.xml", source.metadata)
        onnx.unlink()
        return _check(path, runtimes.run_openvino, source, reference)
    weights.copy_features(source.bundle, source.card, folder)
    return _check(path, runtimes.run_onnx, source, reference)


def _check(path: Path, load: Callable[[Path], Run], source: _Source, reference: Reference) -> Checked:
    views = _plain_views(source.card, reference)
    pixels, wrong = compare_pixels(reference, list(views))
    answers, further = compare_answers(reference, load(path), views)
    return path, {"pixels": pixels, "answers": answers}, [*wrong, *further]


def _plain_views(card: BundleCard, reference: Reference) -> U8:
    """Return the views that a program without torch makes from the images' bytes."""
    side = card.preprocessing.image_size_px
    views, view = np.empty((len(reference.data), side, side, 3), np.uint8), CentreView(card.preprocessing.resize_px)
    for out, data in zip(views, reference.data, strict=True):
        view.fill(out, data, np.zeros(0))
    return views


def _write_int8(
    source: _Source,
    classifier: Classifier,
    path: Path,
    reference: Reference,
    shard_set: ShardSet,
    data: Data,
    console: Console,
) -> Checked:
    """Quantise the ONNX file at `path`, which is removed, and measure the change on the evaluation split."""
    card = runtimes.card_of_int8(source.card)
    with shard_set.reader(data.train_split) as train:
        shards_N, _ = train.records(np.arange(train.num_samples))
        samples = choose_samples(train.labels, shards_N, runtimes.CALIBRATION_IMAGES)
        views = (classifier.view(train.read(sample)) for sample in samples.tolist())
        target = runtimes.quantise(path, path.with_name("model.int8.onnx"), views, metadata_of(card, None))
    for file in (path, path.parent / source.card.file_names[-1]):
        if file.name not in (target.name, "model.json"):
            file.unlink(missing_ok=True)
    answers, wrong = compare_answers(reference, runtimes.run_onnx(target), reference.views, logit_tolerance=None)
    with start_workers(0, "cpu") as decoders:
        before = evaluate_split(classifier, shard_set, data.eval_split, console, decoders)
        after = evaluate_split(OnnxClassifier(target), shard_set, data.eval_split, Console(quiet=True), decoders)
    change = runtimes.measure_change(before.labels, before.probabilities_NK, after.probabilities_NK, reference.policy)
    record = {"calibrated_on": {"split": data.train_split, "images": len(samples)}, "measured_on": data.eval_split}
    return target, {"int8": {**record, "answers": answers, **change}}, wrong


def _record(source: _Source, to: str, path: Path, reference: Reference, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "to": to,
        "file": path.name,
        "sha256": sha256_of(path),
        "files": {file.name: sha256_of(file) for file in sorted(path.parent.iterdir())},
        "model": {"arch": source.card.arch, "weights": source.card.hashes.weights},
        "compared_on": {"manifest": reference.manifest, "split": reference.split, "images": len(reference.names)},
        **record,
        "wasteddp": __version__,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _lines(reference: Reference, record: Mapping[str, Any]) -> Iterator[str]:
    pixels, answers = record["pixels"], record["answers"]
    sizes = [value for name, value in answers.items() if name.startswith("batch_")]
    batches = ", ".join(name.removeprefix("batch_") for name in answers if name.startswith("batch_"))
    yield (
        f"{'before quantisation, ' if 'int8' in record else ''}compared on {len(reference.names)} images of "
        f"{reference.split}, in batches of {batches}: {pixels['equal']} of {pixels['images']} views have equal pixels, "
        f"logits differ by at most {max(one['largest_logit_difference'] for one in sizes):.1e} "
        f"({answers['logit_tolerance']:.1e} allowed), and every class and {answers['decision']} is the same"
    )
    if found := record.get("int8"):
        before, after, change = (found[f"accuracy_{name}"] for name in ("before", "after", "change"))
        yield (
            f"int8 on {found['images']:,} images of {found['measured_on']}: accuracy {percent(after[0])} "
            f"({percent(after[1])} to {percent(after[2])}), before {percent(before[0])}: a change of "
            f"{100 * change[0]:+.1f} points ({100 * change[1]:+.1f} to {100 * change[2]:+.1f})"
        )
        shares = [
            f"{percent(found[name][0])} ({percent(found[name][1])} to {percent(found[name][2])}) have another {what}"
            for name, what in (("changed_classes", "class"), ("changed_decisions", answers["decision"]))
        ]
        yield ", ".join(shares)
