"""`wasteddp evaluate`: evaluate a run's model on one split of its shard set. Each sample is counted exactly once.

Legend: N samples of the split, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console

from wasteddp import settings as settings_file
from wasteddp.data import dataset
from wasteddp.data.dataset import NO_FOLD, ShardSet
from wasteddp.data.decoding.decode import ImageHWC
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.loader import AnyLoader, evaluation_loader, evaluation_steps
from wasteddp.data.manifest import Manifest, Split
from wasteddp.data.reader import SplitReader
from wasteddp.data.remote.folder import is_url
from wasteddp.decisions.bin_files import load_bins
from wasteddp.decisions.decide import PERSON, BinRules, choose_policy
from wasteddp.decisions.intervals import SampleGroups, share_interval
from wasteddp.errors import BundleError, DecisionError, SettingsError, ShardError, WastedError, joined, storage
from wasteddp.files import read_regular
from wasteddp.inference.any_classifier import AnyClassifier
from wasteddp.inference.bundle import BundleCard
from wasteddp.inference.classifier import Classifier, device_type
from wasteddp.inference.comparison import compare, near_by_hashes, near_by_manifest, print_comparison
from wasteddp.inference.evaluation_files import Evaluation, print_evaluation, save_evaluation
from wasteddp.inference.metrics import Answers, Mistakes, Reliability, Seen, confusion_matrix, summarise
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.inference.policy_files import ChosenPolicy, read_policy
from wasteddp.inference.ranks import Ranks, join_ranks
from wasteddp.inference.sorting import dependent_groups, report_policy
from wasteddp.order.plan import PADDING, EvaluationPlan
from wasteddp.parallel import progress
from wasteddp.settings import Data, plain_yaml

ALONE = Ranks()
_STEP = 64  # samples whose shards are fetched ahead, and released, together
_AHEAD = 2  # steps that are decoded ahead
_OF_THE_SET = (
    "train_split",
    "eval_split",
    "shards",
    "fold",
    "cache",
    "cache_gb",
    "fetchers",
    "ahead_steps",
    "read_attempts",
    "read_timeout_s",
)


def evaluate_run(
    run_folder: Path,
    *,
    split: str = "test",
    shards: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    tta: str = "none",
    workers: int | str = 0,
    near_duplicates: bool = False,
    bins: Path | None = None,
    max_error: float | None = None,
    confidence: float = 0.95,
    choose_on: str = "",
    policy: Path | None = None,
) -> bool:
    """Evaluate a run's model, print and save in `RUN/evaluations/<split>/`. With a launcher, the processes share it.

    Return whether this process saved it: of several, the first one does.

    Args:
        shards: folder or URL of the set; None: the one that the model was trained on.
        batch_size: None: a size that suits the device.
        workers: as the setting data.workers.
        near_duplicates: look for those of training images, if sharding did not.
        bins: file of bins, see `decisions.bin_files`; None: those of the shard set.
        max_error: with it or with `bins`, thresholds are chosen on one split, and measured on `split`.
        confidence: with which `max_error` must hold.
        choose_on: split to choose the thresholds on; "": the run's evaluation split.
        policy: policy.json to measure, in the place of `bins` and `max_error`.

    Raises:
        DecisionError: the file of bins or the policy is wrong, there are too few images for a guarantee, or the set has
            no images to choose thresholds on.
    """
    with join_ranks() as ranks:
        device = ranks.device(device)
        with start_workers(workers, device_type(device), cores=ranks.cores) as decoders:
            classifier = Classifier.load(run_folder, device=device, batch_size=batch_size, tta=tta)
            data, classes = data_of(run_folder, shards), classifier.card.classes
            decides = bins is not None or max_error is not None
            if decides and choose_on == data.train_split:
                raise DecisionError(
                    f"the model was trained on the images of {choose_on}",
                    "it is surer of them than of new images, so the thresholds would promise nothing",
                    f"choose them on another split, such as {data.eval_split}",
                )
            rules = (load_bins(bins, classes) if bins else _rules_of_set(classifier.card)) if decides else None
            given = read_policy(policy, classifier.card, tta=tta) if policy else None
            with dataset.open_dataset(data) as shard_set:
                console = Console(quiet=not ranks.is_main)
                manifest, chosen_on = shard_set.manifest, choose_on or data.eval_split
                chooses = rules is not None and (max_error is not None or bool(rules.hazards))
                if chooses:
                    _refuse_without_split(manifest, chosen_on)
                evaluation = evaluate_split(classifier, shard_set, split, console, decoders, ranks)
                chosen = evaluation
                if chooses and split != chosen_on:
                    chosen = evaluate_split(classifier, shard_set, chosen_on, Console(quiet=True), decoders, ranks)
                if not ranks.is_main:  # no collectives from here on
                    return False
                near = _near(shard_set, split, data.train_split, evaluation, look=near_duplicates)
                _report(run_folder, split, classifier, manifest, evaluation, near, console)
                try:
                    if rules:
                        given = ChosenPolicy(
                            choose_policy(
                                rules, chosen.labels, chosen.probabilities_NK, max_error=max_error, level=confidence
                            ),
                            chosen_on,
                            dependent_groups(chosen.groups) if chooses else None,
                            manifest.name,
                            manifest.sha256,
                        )
                    if given:
                        report_policy(
                            run_folder / "evaluations" / split,
                            given,
                            evaluation,
                            classifier.card,
                            console,
                            tta=tta,
                            set_sha256=manifest.sha256,
                            selected=given.chosen_on == data.eval_split,
                        )
                        has_thresholds = given.policy.error is not None or given.policy.hazards
                        if has_thresholds and split == given.chosen_on_in(manifest.sha256):
                            console.print(
                                f"warning: the thresholds were chosen on these images of {split}, so the figures here "
                                "are too good: evaluate another split too",
                                style="yellow", markup=False, highlight=False, soft_wrap=True,
                            )  # fmt: skip
                finally:  # also without decisions: the card must not state those of the evaluation before
                    line = write_model_card(run_folder, manifest=manifest)
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return True


def _refuse_without_split(manifest: Manifest, chosen_on: str) -> None:
    """Refuse to choose thresholds on a split that the set does not have.

    Raises:
        DecisionError: it has none of this name, or no images in it.
    """
    others = [split.name for split in manifest.splits.values() if split.num_samples]
    if chosen_on not in others:
        raise DecisionError(
            f"{manifest.where} has no images in a split called {chosen_on!r}; its splits: {joined(others)}",
            "there would be no images to choose the thresholds on",
            "name a split with --choose-on, or measure thresholds that were chosen before with --policy FILE",
        )


def _rules_of_set(card: BundleCard) -> BinRules:
    """Return the bins of the model's shard set.

    Raises:
        DecisionError: one is called as a person who decides is.
    """
    rules = BinRules.of_map(card.bins, card.classes)
    if PERSON in rules.bins:
        raise DecisionError(
            f"{PERSON!r} is the name of a bin, or of a class without one, in the model's shard set",
            "it stands for a person who decides, so it would not be known where an item goes",
            "give the bins under other names with --bins FILE; docs/decisions.md has the format",
        )
    return rules


def _near(
    shards: ShardSet, split: str, train: str, evaluation: Evaluation, *, look: bool
) -> npt.NDArray[np.bool_] | None:
    """Return which samples have a near-duplicate in the training split [N], or None if it is not known."""
    if split == train or train not in shards.manifest.splits:
        return None
    near = near_by_manifest(shards.manifest, split, train, evaluation.sources)
    if near is None and look:
        with shards.reader(train) as training, shards.reader(split) as reader:
            near = near_by_hashes(training, (reader.read(sample) for sample in range(reader.num_samples)))
    return near


def _report(
    run_folder: Path,
    split: str,
    classifier: Classifier,
    manifest: Manifest,
    evaluation: Evaluation,
    near: npt.NDArray[np.bool_] | None,
    console: Console,
) -> None:
    """Save and print an evaluation."""
    folder, record = run_folder / "evaluations" / split, compare(evaluation, near)
    save_evaluation(
        folder,
        evaluation,
        classifier.card,
        manifest_sha256=manifest.sha256,
        options={
            "split": split,
            "shards": manifest.where,
            "batch_size": classifier.batch_size,
            "device": str(classifier.device),
            "tta": classifier.tta,
        },
        further=record,
    )
    seen = evaluation.seen
    print_evaluation(console, seen, title=f"{run_folder}, {split}: {seen.metrics.num_samples} images")
    print_comparison(console, record)
    console.print(f"saved in {folder}", markup=False, highlight=False, soft_wrap=True)


def evaluate_split(
    classifier: AnyClassifier, shards: ShardSet, split: str, console: Console, workers: Workers, ranks: Ranks = ALONE
) -> Evaluation:
    """All ranks: evaluate the model on one split of an open set. Warn if the model was trained on another set."""
    manifest = shards.manifest
    check_classes(manifest, classifier.card.classes)
    if manifest.sha256 != classifier.card.hashes.manifest:
        console.print(
            f"warning: {manifest.where} is not the shard set that this model was trained on (manifest "
            f"{manifest.sha256[:12]}, trained on {classifier.card.hashes.manifest[:12]}): some of its images may have "
            "been used for training",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    shown = progress("evaluating", manifest.split(split).num_samples) if ranks.is_main else nullcontext(_nothing)
    with shards.reader(split) as reader, shown as advance:
        samples = np.arange(reader.num_samples)
        at_once = _STEP * (_AHEAD + 1) * ranks.local_world_size
        shards.require_room(reader.needs(samples[first : first + at_once]) for first in range(0, len(samples), _STEP))
        found = evaluate(classifier, reader, manifest.split(split), workers=workers, advance=advance, ranks=ranks)
    groups, failure = None, None
    try:
        groups = shards.groups()
    except WastedError as error:
        failure = error
    ranks.raise_together(failure)
    return over_groups(found, SampleGroups(groups.rule, groups.of_split(manifest, split))) if groups else found


def over_groups(evaluation: Evaluation, groups: SampleGroups) -> Evaluation:
    """Return the evaluation with the groups of its samples, and the interval of its accuracy over them."""
    seen = evaluation.seen
    if groups.to_resample is not None:
        right_N = evaluation.probabilities_NK.argmax(axis=1) == evaluation.labels
        low, high = share_interval(right_N, groups.to_resample)
        seen = replace(seen, metrics=replace(seen.metrics, accuracy_low=low, accuracy_high=high))
    return replace(evaluation, seen=seen, groups=groups)


def _nothing() -> None:
    """Progress of the ranks other than the first, which show none."""


def evaluate(
    classifier: AnyClassifier,
    reader: SplitReader,
    split: Split,
    *,
    workers: Workers,
    advance: Callable[[], None],
    ranks: Ranks = ALONE,
) -> Evaluation:
    """All ranks: run the model once on every sample of a split. Return the same result on every rank.

    Args:
        advance: called for each sample; a rank assumes that the others are as far as itself.

    Raises:
        DamagedSampleError: on the first rank, if a sample of any rank cannot be read or decoded: the result would not
            cover the whole split.
        ShardError: the numbers of samples differ from those in the manifest.
    """
    num_classes = len(classifier.card.classes)
    labels = reader.labels
    _check_counts(np.bincount(labels, minlength=num_classes), split, "its index holds")

    # samples, their sources, probabilities [B, K], unlikeness [B]
    done: list[tuple[list[int], list[str], npt.NDArray[np.float32], npt.NDArray[np.float64] | list[None]]] = []
    failure: WastedError | None = None
    size = classifier.card.preprocessing
    with (
        evaluation_loader(
            reader,
            image_size_px=size.image_size_px,
            resize_px=size.resize_px,
            workers=workers.number,
            prefetch=_AHEAD,
            processes=workers.server is not None,
            server=workers.server,
        ) as loader,
        closing(_views(loader, reader, ranks)) as views,
    ):
        try:
            for batch in classifier.batches(views):
                found = classifier.answers([view for _, _, view in batch])
                done.append(([sample for sample, _, _ in batch], [source for _, source, _ in batch], *found))
                for _ in range(len(batch) * ranks.world_size):
                    advance()
        except WastedError as error:
            failure = error
    ranks.raise_together(failure)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    probabilities_NK = np.full((reader.num_samples, num_classes), np.nan, np.float32)
    unlike_N = np.full(reader.num_samples, np.nan)
    sources = [""] * reader.num_samples
    for samples, names, answers_BK, unlike_B in (part for of_rank in ranks.gather(done) for part in of_rank):
        probabilities_NK[samples] = answers_BK
        if classifier.training:
            unlike_N[samples] = unlike_B
        confusion += confusion_matrix(labels[samples], answers_BK.argmax(axis=1), num_classes)
        for sample, name in zip(samples, names, strict=True):
            sources[sample] = name
    # Check that the samples that were classified are those that the manifest counts.
    _check_counts(confusion.sum(axis=1), split, "the model answered for")
    answers = Answers.from_probabilities(labels, probabilities_NK)
    seen = Seen(
        split=split.name,
        classes=classifier.card.classes,
        confusion=confusion,
        metrics=summarise(confusion),
        reliability=Reliability.measure(answers),
        mistakes=Mistakes.find(answers),
    )
    return Evaluation(seen, tuple(sources), labels, probabilities_NK, unlike_N if classifier.training else None)


def _views(loader: AnyLoader, reader: SplitReader, ranks: Ranks) -> Generator[tuple[int, str, ImageHWC], None, None]:
    """Yield (sample, its source, its view uint8 [S, S, C]) of this rank's samples, in order."""
    plan = EvaluationPlan(reader.num_samples, _STEP)
    for step in loader.batches(evaluation_steps(plan, rank=ranks.rank, world_size=ranks.world_size)):
        images_BHWC = step.images_BCHW.permute(0, 2, 3, 1).numpy()
        for sample, view in zip(step.samples.tolist(), images_BHWC, strict=True):
            if sample != PADDING:
                yield sample, reader.source(sample), view


def data_of(run: Path, shards: str | None) -> Data:
    """Return `data` of a run's settings.yaml: where its shard set is and how to read it. `shards` overrides the set.

    Raises:
        SettingsError: neither settings.yaml nor `shards` names a set.
    """
    path = run / "settings.yaml"
    if not path.is_file() and shards is None:
        raise SettingsError(
            f"there is no {path}",
            "the shard set that this model was trained on is not known",
            "name the set with --shards FOLDER",
        )
    found: dict[str, Any] = {}
    if path.is_file():
        with storage("reading the run's settings", path):
            text = read_regular(path)
        try:
            found = {key: value for key, value in plain_yaml(text.decode())["data"].items() if key in _OF_THE_SET}
            found |= {"shards": shards, "fold": NO_FOLD} if shards else {"shards": found["shards"]}
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"{path} does not name its shards (data.shards): {str(error).splitlines()[0]}",
                "there is nothing to evaluate on",
                "name the set with --shards FOLDER",
            ) from error
    data = settings_file.parse(
        yaml.safe_dump({"data": found | ({"shards": shards} if shards else {})}), name=str(path)
    ).data
    if shards is None:
        _refuse_elsewhere(data.shards, run)
    return data


def _refuse_elsewhere(shards: str, run: Path) -> None:
    """Refuse the relative path of a set if it does not exist here: it is relative to where the training was started.

    Raises:
        SettingsError: there is no such folder.
    """
    if is_url(shards) or Path(shards).is_absolute() or Path(shards).exists():
        return
    there = next((parent / shards for parent in run.resolve().parents if (parent / shards).exists()), None)
    raise SettingsError(
        f"{run / 'settings.yaml'} names the shards {shards}, and there is no {shards} in {Path.cwd()}",
        "the path is relative to the folder in which the training was started",
        f"add --shards {there}" if there else "run the command in that folder, or name the set with --shards FOLDER",
    )


def check_classes(manifest: Manifest, classes: tuple[str, ...]) -> None:
    """Check that a shard set has the model's classes in the same order.

    Raises:
        BundleError: the classes differ.
    """
    if manifest.classes != classes:
        raise BundleError(
            f"the model's {len(classes)} classes are not those of {manifest.where}\n"
            f"  model:  {joined(classes)}\n"
            f"  shards: {joined(manifest.classes)} ({len(manifest.classes)})",
            "the same number would mean different classes, and every metric would be wrong",
            "name the set that the model was trained on with --shards, or shard these images with the model's "
            "classes: wasteddp shard IMAGES --out SET --classes-from RUN --fractions 0,0,1",
        )


def _check_counts(counts: npt.NDArray[np.int64], split: Split, who: str) -> None:
    if counts.tolist() != list(split.samples_per_class):
        raise ShardError(
            f"the manifest counts {split.num_samples} samples in {split.name!r}, "
            f"by class {list(split.samples_per_class)}; {who} {int(counts.sum())}, by class {counts.tolist()}",
            "the metrics would be those of another set of images",
            "copy the whole set again, or make it again with `wasteddp shard` or `wasteddp index`",
        )
