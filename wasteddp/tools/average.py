"""`wasteddp average`: average a run's newest checkpoints into a separate model.

    runs/<name>/average/    model.json and weights as in runs/<name>/model/, settings.yaml, evaluations/<split>/

`evaluate` and `predict` accept this folder like the folder of a run.

Late in training the weights move around the edge of a wide minimum of the loss; their mean is closer to its centre.
Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", algorithm 1.

The BatchNorm statistics of the mean are not the mean of the statistics: training images pass through the network again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from wasteddp import environment
from wasteddp import settings as settings_file
from wasteddp.data import dataset
from wasteddp.data.dataset import ShardSet
from wasteddp.data.decoding.crop import EvaluationView, normalise
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.data.loader import Loader, training_steps
from wasteddp.data.train_plan import plan_training
from wasteddp.decisions.calibration import calibrate
from wasteddp.errors import CheckpointError, DecisionError, RunError, inert, storage
from wasteddp.files import RunLock, make_folder, write_atomically
from wasteddp.inference.bundle import FOLDER_NAME, Averaged, BundleCard, save_bundle
from wasteddp.inference.classifier import Classifier, device_type, find_device
from wasteddp.inference.comparison import compare, near_by_manifest
from wasteddp.inference.evaluate import check_classes, evaluate_split
from wasteddp.inference.evaluation_files import Evaluation, save_evaluation
from wasteddp.inference.metrics import Metrics, percent
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.model.networks import build, estimate_statistics
from wasteddp.parallel import num_usable_cores
from wasteddp.settings import Settings
from wasteddp.tools.model_additions import calibration_line
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.best_model import card_of
from wasteddp.training.checkpoint.progress import Progress
from wasteddp.training.checkpoint.reader import State

_PREFETCH = 2
_COUNT = ".num_batches_tracked"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """The arguments of `wasteddp average`. None: a default that depends on the run or the device."""

    run: Path
    last: int = 5
    images: int = 2048
    out: Path | None = None
    replace: bool = False
    shards: str | None = None
    batch_size: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of several checkpoints' weights. The other fields are those of the newest checkpoint."""

    weights: State
    steps: tuple[int, ...]  # oldest first
    moving: frozenset[str]  # BatchNorms that saw images between the oldest and the newest; others are frozen
    progress: Progress
    settings_yaml: str


def run(options: AverageOptions) -> None:
    """Average the checkpoints, compare the result with the run's model, print the comparison, and save the average.

    Raises:
        CheckpointError: the run has fewer than two intact checkpoints.
    """
    console = Console()
    out = _out(options)
    with start_workers(0, device_type(options.device)) as workers:
        _average(options, out, console, workers)


def _average(options: AverageOptions, out: Path, console: Console, workers: Workers) -> None:
    best = Classifier.load(options.run, device=options.device, batch_size=options.batch_size)
    mean = mean_of_newest(options.run / "checkpoints", options.last, _say)
    settings = settings_file.parse(mean.settings_yaml, name=f"the settings of step {mean.steps[-1]}")
    data = settings.data.model_copy(update={"staged": "", "shards": options.shards or settings.data.shards})
    with dataset.open_dataset(data) as shards:
        check_classes(shards.manifest, mean.progress.lineage.classes)
        weights, num_images = _with_statistics(mean, settings, shards, options)
        average = _classifier(mean, weights, settings, shards, options)
        found = evaluate_split(average, shards, data.eval_split, console, workers)
        reference = evaluate_split(best, shards, data.eval_split, console, workers)
    _say(f"mean of the checkpoints of steps {', '.join(map(str, mean.steps))}")
    of_images = f"of {num_images:,} training images, centre views of {data.eval_size_px} px"
    _say(f"BatchNorm's statistics: {of_images if num_images else 'unchanged, since BatchNorm was frozen'}")
    _print(console, settings.data.eval_split, found.seen.metrics, reference.seen.metrics, best.card.trained.step)
    _save(out, mean, weights, average, found, shards, options, train=data.train_split)


def mean_of_newest(folder: Path, last: int, say: Say) -> Mean:
    """Return the mean of the weights of the newest intact checkpoints, computed in float64 with two of them in memory.

    Args:
        folder: `runs/<name>/checkpoints`.
        last: number of checkpoints; fewer if the folder has fewer.
        say: receives a line for each skipped checkpoint.

    Raises:
        CheckpointError: fewer than two are intact.
    """
    sums: State = {}
    newest: reader.Checkpoint | None = None
    oldest: State = {}
    steps: list[int] = []
    for path in reversed(reader.listed(folder)):
        if len(steps) == last:
            break
        try:
            found = reader.read(path)
        except CheckpointError as error:
            say(f"skipped {path}: {error.found}")
            continue
        newest, oldest = newest or found, found.states["model"]
        steps.append(found.progress.step)
        for name, tensor in oldest.items():
            if tensor.is_floating_point():
                sums[name] = sums[name] + tensor if name in sums else tensor.double()
    if newest is None or len(steps) < 2:
        raise CheckpointError(
            f"{folder} holds {len(steps)} intact checkpoint{'' if len(steps) == 1 else 's'}",
            "an average needs at least two",
            "use a run that keeps more: checkpoint.keep_last: 5, or checkpoint.keep_every for a larger distance",
        )
    model = newest.states["model"]
    return Mean(
        weights={name: (sums[name] / len(steps)).to(t.dtype) if name in sums else t for name, t in model.items()},
        steps=tuple(reversed(steps)),
        moving=frozenset(n.removesuffix(_COUNT) for n in model if n.endswith(_COUNT) and model[n] != oldest[n]),
        progress=newest.progress,
        settings_yaml=newest.settings_yaml,
    )


def _with_statistics(mean: Mean, settings: Settings, shards: ShardSet, options: AverageOptions) -> tuple[State, int]:
    """Return the mean's state with its own statistics, and the number of images that they were computed on."""
    device = find_device(options.device)
    model = build(settings.model.arch, len(shards.manifest.classes))
    model.load_state_dict(mean.weights)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    num_images = 0

    def counted() -> Iterator[torch.Tensor]:
        nonlocal num_images
        for images_BCHW in training_batches(settings, shards, options.images, device):
            num_images += len(images_BCHW)
            yield images_BCHW

    if mean.moving:
        estimate_statistics(model, counted(), mean.moving)
    return model.state_dict(), num_images


def training_batches(
    settings: Settings, shards: ShardSet, num_images: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield normalised training images on the device, [B, 3, S, S], with the preprocessing of an evaluation.

    They are centre views at the size of the evaluation, without augmentation, because the model will be used on such
    images (Touvron et al. 2019, "Fixing the train-test resolution discrepancy", also adapt the statistics to the size
    in use). The run's augmentation and its schedule of sizes are not needed.

    They are in the order of the run's first epoch, in full batches of evaluate.batch_size, or in one smaller batch if
    there are fewer.

    Args:
        num_images: number of images, at most one epoch; a remainder that does not fill a batch is left out.
    """
    data, split = settings.data, shards.manifest.split(settings.data.train_split)
    with ExitStack() as stack:
        reader = stack.enter_context(shards.reader(split.name))
        plan = plan_training(split, data, reader.labels, batch_size=settings.train.batch_size, seed=settings.run.seed)
        steps = min(plan.steps_per_epoch, -(-num_images // plan.global_batch))
        planned = [part for _, _, part in training_steps(plan, 0, steps, rank=0, world_size=1)]
        samples = np.concatenate(planned)[:num_images] % reader.num_samples
        size = min(settings.evaluate.batch_size, len(samples))
        parts = samples[: len(samples) // size * size].reshape(-1, size)
        shards.require_room(reader.needs(parts[at : at + _PREFETCH + 1].reshape(-1)) for at in range(len(parts)))
        loader = stack.enter_context(
            Loader(
                reader,
                EvaluationView(data.eval_resize_px),
                image_size_px=data.eval_size_px,
                workers=num_usable_cores(),
                prefetch=_PREFETCH,
                replace=True,  # replace undecodable images, as in training
            )
        )
        for batch in loader.batches((0, number, part) for number, part in enumerate(parts)):
            yield normalise(batch.images_BCHW.to(device), settings.model.mean, settings.model.std)


def _classifier(
    mean: Mean, weights: State, settings: Settings, shards: ShardSet, options: AverageOptions
) -> Classifier:
    """Return the average as a classifier. Its card does not have the measured value yet."""
    steps_per_epoch = shards.manifest.split(settings.data.train_split).num_samples // settings.train.batch_size
    card = card_of(
        settings,
        shards.manifest,
        replace(mean.progress, best_value=0.0),
        epoch=(mean.steps[-1] - 1) // steps_per_epoch,
        commit=environment.commit(),
    )
    hashes = replace(card.hashes, manifest=mean.progress.lineage.manifest)
    card = replace(card, averaged=Averaged(steps=mean.steps), hashes=hashes)
    return Classifier(card, weights, device=options.device, batch_size=options.batch_size)


def _out(options: AverageOptions) -> Path:
    """Return the folder of the average. It must not be the folder of a run."""
    out = options.out or options.run / "average"
    if (out / "checkpoints").exists() or (out / "metrics.jsonl").exists():
        raise RunError(
            f"{out} is the folder of a run",
            "the average would replace the settings and the model of that run",
            "name another folder with --out, or omit --out; --replace replaces only RUN/model",
        )
    return out


def _save(
    out: Path,
    mean: Mean,
    weights: State,
    average: Classifier,
    found: Evaluation,
    shards: ShardSet,
    options: AverageOptions,
    *,
    train: str,
) -> None:
    """Write the bundle, then its evaluation: a kill between the two leaves a complete model."""
    trained = average.card.trained
    card = replace(average.card, trained=replace(trained, value=getattr(found.seen.metrics, trained.metric)))
    with ExitStack() as stack:
        if options.replace:
            claim = RunLock(options.run / "checkpoints", _say, wait_s=0)  # a training would overwrite the model
            stack.callback(claim.release)
            home, folder = options.run, options.run / FOLDER_NAME
        else:
            home = folder = out
            with storage("creating the folder of the average", out):
                make_folder(out)
            write_atomically(
                out / "settings.yaml", mean.settings_yaml.encode()
            )  # `evaluate` reads the shards' folder from it
        calibrated, line = _calibrated(card, found, home)
        card = replace(card, hashes=save_bundle(folder, calibrated, weights).hashes)  # evaluated without calibration
        split = found.seen.split
        near = near_by_manifest(shards.manifest, split, train, found.sources)
        save_evaluation(
            home / "evaluations" / split,
            found,
            card,
            manifest_sha256=shards.manifest.sha256,
            options={
                "split": split,
                "shards": shards.manifest.where,
                "batch_size": average.batch_size,
                "device": str(average.device),
                "tta": average.tta,
            },
            further=compare(found, near),
        )
        card_line = write_model_card(home, manifest=shards.manifest)
    for said in (line, card_line, f"written: {folder}"):
        _say(said)


def _calibrated(card: BundleCard, found: Evaluation, home: Path) -> tuple[BundleCard, str]:
    """Return the card with a temperature, as a training's best model gets it, and a line on that."""
    try:
        calibration = calibrate(
            found.labels,
            found.probabilities_NK,
            split=found.seen.split,
            groups=found.groups.to_resample if found.groups else None,
        )
    except DecisionError as error:
        return card, f"not calibrated: {error.found}; {error.remedy}, then: wasteddp calibrate {home}"
    return replace(card, temperature=calibration.temperature, calibration=calibration.to_json()), calibration_line(
        calibration
    )


def _print(console: Console, split: str, average: Metrics, best: Metrics, best_step: int) -> None:
    table = Table(title=f"{split}, {average.num_samples} images of {average.averaged}", title_justify="left")
    table.add_column()
    for column in (f"the run's model, step {best_step}", "the average"):
        table.add_column(column, justify="right")
    for name in ("accuracy", "macro_recall", "macro_f1"):
        table.add_row(name.replace("_", " "), percent(getattr(best, name)), percent(getattr(average, name)))
    console.print(table)


def _say(line: str) -> None:
    print(inert(line), flush=True)
