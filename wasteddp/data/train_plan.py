"""The training order of a split, and the command `wasteddp plan`, which previews it from the manifest and indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wasteddp.data.manifest import Manifest, Split, read_index
from wasteddp.order import plan_quality
from wasteddp.order.balance import Balance
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Data, Settings


def plan_training(
    split: Split, data: Data, labels: plan_quality.Labels | None = None, *, batch_size: int, seed: int
) -> TrainPlan:
    """Return the order that the settings define for a split.

    Args:
        split: to train on.
        data: its lanes, blocks, window and balance.
        labels: of its samples, [N]; needed only for data.balance.
        batch_size: samples in a step of all ranks.
        seed: of the run.
    """
    plan = TrainPlan(
        num_samples=split.num_samples,
        global_batch=batch_size,
        seed=seed,
        lanes=data.lanes or batch_size,
        block=data.block,
        window=data.window,
        shard_samples=tuple(shard.num_samples for shard in split.shards),
    )
    if not data.balance:
        return plan
    if labels is None:
        raise ValueError("data.balance needs labels")
    balance = Balance.from_labels(
        labels,
        data.balance,
        num_classes=len(split.samples_per_class),
        num_draws=plan.steps_per_epoch * batch_size,
        seed=seed,
    )
    return replace(plan, balance=balance)


def preview(manifest: Manifest, settings: Settings, *, nodes: Sequence[int]) -> str:
    """Return lines about the steps, the shuffle and what each node would fetch.

    Args:
        manifest: of the set.
        settings: of the run.
        nodes: numbers of nodes to compare.

    Raises:
        ShardError: there is no such split, or an index cannot be read.
        SettingsError: the split has fewer samples than a batch.
    """
    split = manifest.split(settings.data.train_split)
    labels = np.concatenate([read_index(manifest.folder, shard)["label"] for shard in split.shards])
    plan = plan_training(split, settings.data, labels, batch_size=settings.train.batch_size, seed=settings.run.seed)
    epochs = settings.train.epochs
    lines = [
        f"{manifest.name}: {plan.num_samples} {split.name} samples in {plan.num_shards} shards",
        f"{plan.steps_per_epoch} steps an epoch of {plan.global_batch}, {plan.steps_per_epoch * epochs} in {epochs} "
        + "epochs"
        + ("" if plan.balance else f"; each epoch leaves out {plan.left_out_per_epoch}, different ones each time"),
        *([plan.balance.describe(manifest.classes)] if plan.balance else []),
        plan_quality.describe(plan, labels),
        "",
        "nodes  shards a node  fetched, of its share  shards within 10 steps",
    ]
    for num in nodes:
        if plan.lanes % num:
            lines.append(f"{num:5}  not possible: {plan.lanes} lanes")
            continue
        found = plan_quality.measure_traffic(plan, [shard.num_bytes for shard in split.shards], num_nodes=num)
        lines.append(f"{num:5}  {found.most_shards:13}  {found.fetched:21.2f}  {found.at_once:22}")
    return "\n".join(lines)
