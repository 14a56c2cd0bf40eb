"""`wasteddp features`: add the features of training images to a model that has none, such as an older one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasteddp.data import dataset
from wasteddp.errors import BundleError
from wasteddp.files import hold_run
from wasteddp.inference.bundle import FOLDER_NAME
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.evaluate import check_classes, data_of
from wasteddp.inference.feature_files import save_features
from wasteddp.inference.training_features import MOST_REFERENCE, MOST_TRAINING, summarise_training
from wasteddp.parallel import progress


@dataclass(frozen=True, slots=True)
class FeaturesOptions:
    """The command line of `wasteddp features`. None: a default that depends on the run or the device."""

    run: Path
    shards: str | None = None
    batch_size: int | None = None
    device: str = "auto"


def run(options: FeaturesOptions) -> None:
    """Compute the features and save them in the run's model.

    Raises:
        BundleError: there is no model, or the set is not the one that it was trained on.
    """
    classifier = Classifier.load(options.run, device=options.device, batch_size=options.batch_size)
    data = data_of(options.run, options.shards)
    with dataset.open_dataset(data) as shards:
        manifest = shards.manifest
        check_classes(manifest, classifier.card.classes)
        if manifest.sha256 != classifier.card.hashes.manifest:
            raise BundleError(
                f"{manifest.where} (manifest {manifest.sha256[:12]}) is not the shard set that this model was trained "
                f"on ({classifier.card.hashes.manifest[:12]})",
                "its training images would not be those of the model",
                "name the set that the model was trained on with --shards",
            )
        with shards.reader(data.train_split) as train, shards.reader(data.eval_split) as reference:
            total = min(MOST_TRAINING, train.num_samples) + min(MOST_REFERENCE, reference.num_samples)
            with progress("reading training images", total) as advance:

                def watched(batches: Iterable[Any]) -> Iterator[Any]:
                    for batch in batches:
                        yield batch
                        for _ in range(len(batch.labels_B)):
                            advance()

                features = summarise_training(classifier, train, reference, watched=watched)
    with hold_run(options.run, print):  # a training would replace the model
        save_features(options.run, features, weights=classifier.card.hashes.weights)
    home = options.run / FOLDER_NAME
    print(
        f"features of {features.num_training:,} images of {data.train_split}, compared with "
        f"{features.num_reference:,} of {data.eval_split}; saved in {home if home.is_dir() else options.run}"
    )
