"""Whether a threshold promises something, and whether it held: the words are the same on every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Outcome = Literal["held", "chance", "broken"]


def is_promised(record: Mapping[str, Any]) -> bool:
    """Whether the thresholds of decisions.json have guarantees: they were chosen on images that have no groups.

    Images of one group resemble each other, so there are fewer independent ones than the bounds count. A record that
    does not have the groups of the images that the thresholds were chosen on is of the same set: those measured on.
    """
    return record.get("chosen_groups", record["groups"]) is None


def outcome(value: float, limit: float, interval: Sequence[float] | None, *, at_most: bool) -> Outcome:
    """Return whether a limit was kept, or was not and chance may be the reason, or was not in spite of chance."""
    if value <= limit if at_most else value >= limit:
        return "held"
    if not interval or interval[0] <= limit <= interval[1]:
        return "chance"
    return "broken"


def in_words(found: Outcome, *, promised: bool) -> str:
    """Return what happened to a promise or an aim, to follow "the promise" or "the aim"."""
    if found == "held":
        return "held here" if promised else "was reached here"
    missed = "was not kept here" if promised else "was not reached here"
    return missed + (", perhaps by chance" if found == "chance" else ", and chance does not explain it")


def no_promise(record: Mapping[str, Any]) -> str:
    """Return why nothing is promised; "": there are promises, or no thresholds."""
    if is_promised(record) or not (record["policy"]["error"] or record["hazards"]):
        return ""
    groups = record.get("chosen_groups", record["groups"])
    number = f"{groups['num_groups']:,} group{'s' * (groups['num_groups'] != 1)}"
    return (
        f"no error and no recall is promised: the thresholds were chosen on images of {number} ({groups['rule']}), and "
        "images of a group resemble each other"
    )
