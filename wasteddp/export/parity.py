"""The check of an exported file: from an image file's bytes, it must see the same pixels and give the same answers.

Legend: N images of a split, B of them at once, S side of the view, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wasteddp.data.dataset import ShardSet
from wasteddp.decisions.decide import BinRules, Policy
from wasteddp.inference.classifier import Classifier

BATCH_SIZES = (1, 7, 8)
LOGIT_TOLERANCE = 1e-4  # times the largest logit, or 1 if that is smaller
MOST_NAMED = 3

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Run = Callable[[Any], tuple[F32, F32]]  # inputs of B images, usually uint8 [B, S, S, 3] -> probabilities, logits [B, K]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Images of a split, and what the model answers for them."""

    split: str
    manifest: str  # sha256 of the set's
    names: tuple[str, ...]  # [N], the sources
    data: tuple[bytes, ...]  # [N], image files
    views: U8  # [N, S, S, 3]
    probabilities: F32  # [N, K]
    logits: F32  # [N, K]
    policy: Policy
    has_policy: bool  # False: the decision is the bin of the most probable class

    def decisions(self, probabilities_NK: F32) -> npt.NDArray[np.int64]:
        return self.policy.decide(probabilities_NK).assigned


def read_reference(
    classifier: Classifier, logits: Run, shards: ShardSet, split: str, number: int, policy: Policy | None
) -> Reference:
    """Read at most `number` evenly spaced images of a split, and let the model answer.

    Args:
        logits: the same network, which returns its logits too.
        policy: of the model; None: the bins of its card.

    Raises:
        ShardError: there is no such split, or an image of it cannot be read.
    """
    with shards.reader(split) as reader:
        chosen = np.unique(np.linspace(0, reader.num_samples - 1, min(number, reader.num_samples)).astype(int)).tolist()
        data = tuple(reader.read(sample) for sample in chosen)
        names = tuple(reader.source(sample) for sample in chosen)
    views = np.stack([classifier.view(one) for one in data])
    card = classifier.card
    return Reference(
        split,
        shards.manifest.sha256,
        names,
        data,
        views,
        classifier.probabilities(list(views)),
        np.concatenate([logits(views[at : at + 8])[1] for at in range(0, len(views), 8)]),
        policy or Policy(BinRules.of_map(card.bins, card.classes)),
        policy is not None,
    )


def compare_pixels(
    reference: Reference, views: Sequence[U8], *, tolerance: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """Return the differences of the views that the exported model sees, and what is beyond the tolerance.

    Args:
        tolerance: levels of 255 by which a pixel may differ.
    """
    levels = [
        int(np.abs(own.astype(np.int16) - other.astype(np.int16)).max())
        for own, other in zip(reference.views, views, strict=True)
    ]
    record = {
        "images": len(levels),
        "equal": levels.count(0),
        "largest_difference": max(levels, default=0),
        "tolerance": tolerance,
    }
    wrong = [f"{name}: pixels differ by {one} of 255" for name, one in zip(reference.names, levels, strict=True)
             if one > tolerance]  # fmt: skip
    return record, wrong


def compare_answers(
    reference: Reference,
    run: Run,
    inputs: Any,
    *,
    logit_tolerance: float | None = LOGIT_TOLERANCE,
    sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[dict[str, Any], list[str]]:
    """Run the exported model on the inputs in batches of each size. Return the differences, and what is wrong.

    Args:
        run: the exported model.
        inputs: of the N images.
        logit_tolerance: times the largest logit; None: logits may differ by any amount.
    """
    classes, decisions = reference.probabilities.argmax(axis=1), reference.decisions(reference.probabilities)
    limit = None if logit_tolerance is None else logit_tolerance * max(1.0, float(np.abs(reference.logits).max()))
    record: dict[str, Any] = {"logit_tolerance": limit, "decision": "policy" if reference.has_policy else "bin"}
    wrong: list[str] = []
    for size in sizes:
        parts = [run(inputs[at : at + size]) for at in range(0, len(inputs), size)]
        probabilities_NK, logits_NK = (np.concatenate(found) for found in zip(*parts, strict=True))
        apart = np.abs(logits_NK - reference.logits).max(axis=1)
        other_class = probabilities_NK.argmax(axis=1) != classes
        other_decision = reference.decisions(probabilities_NK) != decisions
        record[f"batch_{size}"] = {
            "largest_logit_difference": float(apart.max()),
            "largest_probability_difference": float(np.abs(probabilities_NK - reference.probabilities).max()),
            "same_class": int((~other_class).sum()),
            "same_decision": int((~other_decision).sum()),
        }
        if not np.isfinite(apart).all() or (limit is not None and (apart > limit).any()):
            worst = int(np.argmax(np.where(np.isfinite(apart), apart, np.inf)))
            wrong.append(f"{reference.names[worst]}, batches of {size}: logits differ by {apart[worst]:.3g}")
        if limit is None:
            continue
        for what, other in (("class", other_class), ("decision", other_decision)):
            named = [reference.names[number] for number in np.flatnonzero(other)[:MOST_NAMED]]
            if named:
                wrong.append(f"{', '.join(named)}, batches of {size}: another {what} ({int(other.sum())} images)")
    return record, wrong
