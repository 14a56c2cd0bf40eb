"""The bins of a municipality or plant: a YAML file that says where each class goes, and what errors cost.

    name: Example city
    classes:
      glass: glass                                          # class: bin
      paper: {bin: paper, grams: 12}                        # mean mass of an item, for figures by mass
      battery: {bin: hazardous, hazard: true, recall: 0.99, confidence: 0.95}
    costs:                                                  # optional, in any unit
      wrong: 1                                              # an item in a wrong bin (default 1)
      person: 0.1                                           # a person looks at the item
      paper: {glass: 5}                                     # true class: {bin: cost}

A file with `class: bin` lines alone is accepted too. K classes, B bins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wasteddp.decisions.decide import PERSON, BinRules, Hazard
from wasteddp.decisions.intervals import F64
from wasteddp.errors import DecisionError, joined
from wasteddp.files import read_text
from wasteddp.settings import plain_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


Number = Annotated[float, Field(strict=True)]  # `person: yes` is not a cost of 1
Share = Annotated[float, Field(gt=0, lt=1)]


class _Class(_Strict):
    bin: str = Field(min_length=1)
    grams: float | None = Field(default=None, gt=0, lt=1e9)
    hazard: bool = False
    recall: Share = 0.99
    confidence: Share = 0.95


class _File(_Strict):
    name: str = ""
    classes: dict[str, _Class] = Field(min_length=1)
    costs: dict[str, Number | dict[str, Number]] = Field(default_factory=dict)


def load_bins(path: Path, classes: Sequence[str]) -> BinRules:
    """Read a file of bins for a model's classes.

    Raises:
        DecisionError: the file is not valid, or is not about these classes.
    """
    text = read_text(path, "reading the bins")
    try:
        raw = plain_yaml(text)
        if isinstance(raw, dict) and "classes" not in raw:
            raw = {"classes": plain_yaml(text, as_text=True)}
        if isinstance(raw, dict) and isinstance(raw["classes"], dict):
            short = {name: {"bin": one} for name, one in raw["classes"].items() if isinstance(one, str)}
            raw = {**raw, "classes": {**raw["classes"], **short}}
        parsed = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _wrong(path, f"{where or 'the file'}: {first['msg']}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _wrong(path, f"it is not YAML: {str(error).splitlines()[0]}") from error
    entries = parsed.classes
    if unknown := [name for name in entries if name not in classes]:
        raise _wrong(path, f"{_listed(unknown)}: the model has no such class; its classes are {joined(classes)}")
    if missing := [name for name in classes if name not in entries]:
        raise _wrong(path, f"the class {_listed(missing)} has no bin")
    spellings: dict[str, str] = {}
    for entry in entries.values():
        plain = " ".join(entry.bin.split()).casefold()
        if plain == PERSON:
            raise _wrong(path, f"{entry.bin!r} cannot be a bin's name: {PERSON} stands for a person who decides")
        if not plain:
            raise _wrong(path, f"{entry.bin!r} cannot be a bin's name: it is blank")
        if (other := spellings.setdefault(plain, entry.bin)) != entry.bin:
            raise _wrong(path, f"the bins {other!r} and {entry.bin!r} would be two: write one name in one way")
    if idle := [n for n, one in entries.items() if not one.hazard and {"recall", "confidence"} & one.model_fields_set]:
        raise _wrong(
            path, f"{_listed(idle)} has a `recall` or `confidence` and no `hazard: true`, so no floor would hold"
        )
    with_mass = [name for name in classes if entries[name].grams is not None]
    if with_mass and len(with_mass) < len(classes):
        raise _wrong(path, f"{_listed([n for n in classes if n not in with_mass])} has no `grams`, other classes have")
    bins = tuple(dict.fromkeys(entries[name].bin for name in classes))
    bin_of = tuple(bins.index(entries[name].bin) for name in classes)
    costs_KB, person = _costs(path, parsed.costs, classes, bins, bin_of)
    return BinRules(
        name=parsed.name or path.stem,
        classes=tuple(classes),
        bins=bins,
        bin_of=bin_of,
        grams=tuple(float(entries[name].grams or 0) for name in classes) if with_mass else (),
        hazards=tuple(Hazard(n, entries[n].recall, entries[n].confidence) for n in classes if entries[n].hazard),
        costs_KB=costs_KB,
        person=person,
        sha256=hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(),
    )


def _costs(
    path: Path,
    given: Mapping[str, float | Mapping[str, float]],
    classes: Sequence[str],
    bins: Sequence[str],
    bin_of: Sequence[int],
) -> tuple[F64 | None, float | None]:
    """Return the costs [K, B] and that of a person, or None for what is not given."""
    if not given:
        return None, None
    numbers = {name: value for name, value in given.items() if isinstance(value, int | float)}
    tables = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    if unknown := [name for name in numbers if name not in ("wrong", PERSON)]:
        raise _wrong(path, f"costs.{unknown[0]} is a number; only `wrong` and `{PERSON}` are, a class has bins: costs")
    if unknown := [name for name in tables if name not in classes]:
        raise _wrong(path, f"costs: the model has no class {_listed(unknown)}")
    everything = [*numbers.items(), *((f"{name}.{b}", c) for name, row in tables.items() for b, c in row.items())]
    for name, cost in everything:
        if not 0 <= cost < 1e12:
            raise _wrong(path, f"costs.{name} is {cost:g}: a cost is a number from 0 to 1e12")
    costs_KB = np.full((len(classes), len(bins)), float(numbers.get("wrong", 1.0)))
    costs_KB[np.arange(len(classes)), bin_of] = 0.0
    for name, row in tables.items():
        for bin_name, cost in row.items():
            if bin_name not in bins:
                raise _wrong(path, f"costs.{name}: no class goes into the bin {bin_name!r}; bins are {', '.join(bins)}")
            costs_KB[classes.index(name), bins.index(bin_name)] = cost
    return costs_KB, float(numbers[PERSON]) if PERSON in numbers else None


def _listed(names: Sequence[str]) -> str:
    return joined(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _wrong(path: Path, found: str) -> DecisionError:
    return DecisionError(
        f"{path}: {found}",
        "items would go into wrong bins, or nowhere",
        "correct the file; `configs/bins/` has examples, docs/decisions.md the format",
    )
