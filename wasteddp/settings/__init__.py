"""The settings of a run: one YAML file, and one frozen model of its contents."""

from wasteddp.settings.reading import explained_yaml, json_schema, known_keys, leaves, load, parse, plain_yaml
from wasteddp.settings.sections import (
    Augment,
    Checkpoint,
    Data,
    Ddp,
    Evaluate,
    Model,
    Optimizer,
    Profile,
    Run,
    Schedule,
    Settings,
    Track,
    Train,
)

__all__ = [
    "Augment",
    "Checkpoint",
    "Data",
    "Ddp",
    "Evaluate",
    "Model",
    "Optimizer",
    "Profile",
    "Run",
    "Schedule",
    "Settings",
    "Track",
    "Train",
    "explained_yaml",
    "json_schema",
    "known_keys",
    "leaves",
    "load",
    "parse",
    "plain_yaml",
]
