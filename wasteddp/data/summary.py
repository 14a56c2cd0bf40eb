"""Text summary of a shard set: its contents, the images that were left out, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from wasteddp.data.dataset import num_folds
from wasteddp.data.manifest import LeftOut, Manifest
from wasteddp.errors import inert, joined, visible

_MAX_NAMED = 10


def summarise(manifest: Manifest) -> str:
    """Return the summary as lines for a terminal or a log, without colours."""
    return inert("\n".join(_lines(manifest)))


def _lines(manifest: Manifest) -> Iterator[str]:
    splits = list(manifest.splits.values())
    num_shards, num_bytes = sum(len(s.shards) for s in splits), sum(t.num_bytes for s in splits for t in s.shards)
    total = sum(split.num_samples for split in splits)
    yield f"{manifest.where}: {total:,} samples in {num_shards} shard(s), {num_bytes / 1e6:,.1f} MB"
    rows = [["", *(split.name for split in splits)]]
    for number, name in enumerate(manifest.classes):
        rows.append([visible(name), *(f"{split.samples_per_class[number]:,}" for split in splits)])
    rows.append(["all", *(f"{split.num_samples:,}" for split in splits)])
    yield from _table(rows)
    for split in splits:
        none = [name for name, count in zip(manifest.classes, split.samples_per_class, strict=True) if not count]
        if none:
            yield (
                f"warning: {split.name} has no samples of {joined(none)}, so evaluations on it do not cover them. Add "
                "images of them, or make the set with other --fractions or --split-rule stratified, or move images if "
                "the source is split already; --least-per-class N refuses such a set"
            )
    wanted = ("test",) if num_folds(manifest) else ("train", "val", "test")
    missing = [name for name in wanted if name not in manifest.splits]
    if missing:
        yield f"warning: there are no samples in {', '.join(missing)}"
    if manifest.groups:
        yield f"{manifest.groups['num_groups']:,} groups by {manifest.groups['rule']}, none of them divided"
    yield from _fractions(manifest)
    yield from _left_out(manifest.left_out)
    yield from _near_duplicates(manifest)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(["", first.ljust(widths[0]), *cells])


def _left_out(left_out: Sequence[LeftOut]) -> Iterator[str]:
    for reason, count in Counter(left.reason for left in left_out).most_common():
        if reason in ("duplicate", "not_listed"):
            yield f"left out, {reason}: {count:,}; manifest.json names them"
            continue
        yield f"left out, {reason}: {count:,}"
        if reason == "conflicting_label":
            yield (
                "    to use them, correct their labels with --corrections FILE (lines `path,class` or `path,,drop`), "
                "or keep the first of each with --keep-conflicts"
            )
        named = [left for left in left_out if left.reason == reason][:_MAX_NAMED]
        yield from (f"    {left.source}: {left.detail}" for left in named)
        if count > len(named):
            yield f"    ... and {count - len(named):,} more; manifest.json lists them all"


def _fractions(manifest: Manifest) -> Iterator[str]:
    """Compare the sizes of the splits with the fractions: more than a hundredth and than one image of each class."""
    options, total = manifest.recipe.get("options", {}), sum(split.num_samples for split in manifest.splits.values())
    if options.get("split_rule") == "stratified" and not options.get("leave_out"):
        wanted = dict(zip(("train", "val", "test"), options["fractions"], strict=True))
        if folds := num_folds(manifest):
            inside = 1 - wanted["test"]
            wanted = {name: inside / folds for name in manifest.splits if name != "test"} | {"test": wanted["test"]}
        for name, fraction in wanted.items():
            found = manifest.splits[name].num_samples if name in manifest.splits else 0
            if abs(found - fraction * total) > max(total / 100, len(manifest.classes)):
                largest = manifest.near_duplicates["largest_chain"]
                why = "in one group, near-duplicates included," if manifest.groups else "near-duplicates of each other"
                yield (
                    f"warning: {name} has {found / total:.1%} of the images, {fraction:.1%} were asked for; "
                    f"{largest:,} images are {why} and stay in one split"
                )


def _near_duplicates(manifest: Manifest) -> Iterator[str]:
    if "numbers_are" in manifest.near_duplicates:
        yield "near-duplicates: the numbers are lower bounds, since some images have very many"
    for where, counts in manifest.near_duplicates.get("across_splits", {}).items():
        if counts["pairs"]:
            other = next(name for name in manifest.splits if where.endswith(f"-{name}"))
            one = where.removesuffix(f"-{other}")
            share = counts[f"{other}_images"] / manifest.splits[other].num_samples
            yield (
                f"near-duplicates: {counts[f'{other}_images']} images of {other} ({share:.1%}) also occur in {one} "
                f"({counts['pairs']} pairs); --group-near-duplicates keeps such images in one split"
            )
