"""`wasteddp features`: add the features of training images to a model that has none, such as an older one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wasteddp.data import dataset
from wasteddp.errors import BundleError, inert
from wasteddp.files import hold_run
from wasteddp.inference.bundle import FOLDER_NAME
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.evaluate import check_classes, data_of
from wasteddp.inference.feature_files import save_features
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.inference.training_features import MOST_REFERENCE, MOST_TRAINING, summarise_training
from wasteddp.parallel import progress


def run(run_folder: Path, *, shards: str | None = None, batch_size: int | None = None, device: str = "auto") -> None:
    """Compute the features and save them in the run's model.

    Raises:
        BundleError: there is no model, or the set is not the one that it was trained on.
    """
    with hold_run(run_folder, print):  # a training that runs is found before the images are read
        classifier = Classifier.load(run_folder, device=device, batch_size=batch_size)
    data = data_of(run_folder, shards)
    with dataset.open_dataset(data) as there:
        manifest = there.manifest
        check_classes(manifest, classifier.card.classes)
        if manifest.sha256 != classifier.card.hashes.manifest:
            raise BundleError(
                f"{manifest.where} (manifest {manifest.sha256[:12]}) is not the shard set that this model was trained "
                f"on ({classifier.card.hashes.manifest[:12]})",
                "its training images would not be those of the model",
                "name the set that the model was trained on with --shards",
            )
        with there.reader(data.train_split) as train, there.reader(data.eval_split) as reference:
            total = min(MOST_TRAINING, train.num_samples) + min(MOST_REFERENCE, reference.num_samples)
            with progress("reading training images", total) as advance:

                def watched(batches: Iterable[Any]) -> Iterator[Any]:
                    for batch in batches:
                        yield batch
                        for _ in range(len(batch.labels_B)):
                            advance()

                features = summarise_training(classifier, train, reference, watched=watched)
    with hold_run(run_folder, print):  # a training would replace the model
        save_features(run_folder, features, weights=classifier.card.hashes.weights)
    home = run_folder / FOLDER_NAME
    print(
        f"features of {features.num_training:,} images of {data.train_split}, compared with "
        f"{features.num_reference:,} of {data.eval_split}; saved in {home if home.is_dir() else run_folder}"
    )
    print(inert(write_model_card(run_folder, manifest=manifest)))
