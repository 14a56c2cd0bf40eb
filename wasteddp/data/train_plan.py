"""What a training would do with a shard set, from its manifest alone: the command `wasteddp plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from wasteddp.data.manifest import Manifest, Split, read_index
from wasteddp.order import shuffle_quality, traffic
from wasteddp.order.balance import Balance
from wasteddp.order.plan import TrainPlan
from wasteddp.settings import Settings


def train_plan(split: Split, settings: Settings, labels: shuffle_quality.Labels | None = None) -> TrainPlan:
    """The order that these settings give to a split. `labels` of its samples, [N], are needed for data.balance."""
    plan = TrainPlan(
        num_samples=split.num_samples,
        global_batch=settings.train.batch_size,
        seed=settings.run.seed,
        lanes=settings.num_lanes,
        block=settings.data.block,
        window=settings.data.window,
        shard_samples=tuple(shard.num_samples for shard in split.shards),
    )
    if not settings.data.balance:
        return plan
    if labels is None:
        raise ValueError("balanced draws are made of the labels")
    balance = Balance.of(
        labels,
        settings.data.balance,
        num_classes=len(split.samples_per_class),
        num_draws=plan.steps_per_epoch * plan.global_batch,
        seed=plan.seed,
    )
    return replace(plan, balance=balance)


def forecast(manifest: Manifest, settings: Settings, *, nodes: Sequence[int]) -> str:
    """Lines on the steps, the shuffle and what each of `nodes` nodes would fetch.

    Raises:
        ShardError: no such split, or an index that cannot be read.
        SettingsError: a batch that the split cannot fill.
    """
    split = manifest.split(settings.data.train_split)
    labels = np.concatenate([read_index(manifest.folder, shard)["label"] for shard in split.shards])
    plan = train_plan(split, settings, labels)
    epochs = settings.train.epochs
    lines = [
        f"{manifest.name}: {plan.num_samples} {split.name} samples in {plan.num_shards} shards",
        f"{plan.steps_per_epoch} steps an epoch of {plan.global_batch}, {plan.steps_per_epoch * epochs} in {epochs} "
        + ("epochs" if plan.balance else f"epochs; each epoch leaves out {plan.left_out_per_epoch}, others each time"),
        *([plan.balance.describe(manifest.classes)] if plan.balance else []),
        shuffle_quality.describe(plan, labels),
        "",
        "nodes  shards a node  fetched, of its share  shards within 10 steps",
    ]
    for num in nodes:
        if plan.lanes % num:
            lines.append(f"{num:5}  not possible: {plan.lanes} lanes")
            continue
        found = traffic.measure(plan, [shard.num_bytes for shard in split.shards], num_nodes=num)
        lines.append(f"{num:5}  {found.most_shards:13}  {found.fetched:21.2f}  {found.at_once:22}")
    return "\n".join(lines)
