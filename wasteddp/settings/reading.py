"""Read settings from a YAML file and `--set`. Errors name the wrong key, its value and the most similar known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from wasteddp.errors import SettingsError, storage
from wasteddp.redaction import redacted
from wasteddp.settings.sections import Settings, is_section

_MOST_YAML = 10_000_000  # characters


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a YAML file, after applying `section.key=value` overrides.

    Raises:
        SettingsError: not YAML, an unknown key, a wrong type, or an impossible value or combination.
        StorageError: the file cannot be read.
    """
    with storage("reading the settings", path):
        text = Path(path).read_text(encoding="utf-8")
    return parse(text, overrides, name=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, name: str = "the settings") -> Settings:
    """Do as `load`, from the text of a file."""
    try:
        tree = plain_yaml(text) or {}
    except yaml.YAMLError as error:
        found = f"{name} is not YAML: {redacted(str(error))}"
        raise SettingsError(found, "no setting can be read", "fix the line that the message names") from error
    if not isinstance(tree, dict):
        found = f"{name} is a {type(tree).__name__}, not a mapping of sections"
        raise SettingsError(found, "no setting can be read", "write `section:` and below it `key: value` lines")
    for override in overrides:
        _apply(tree, override)
    _refuse_secrets(tree, "")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, name) from error


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: a few lines of them can expand to billions of values, and settings do not need them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """Return the content of an untrusted YAML file: plain values, no Python objects, no aliases, no endless nesting.

    Raises:
        yaml.YAMLError: the text is not such a file, or is too large.
    """
    if len(text) > _MOST_YAML:
        raise yaml.YAMLError(f"{len(text):,} characters; the limit is {_MOST_YAML:,}")
    try:
        return _PlainLoader(text).get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits, the date 2024-13-45
        raise yaml.YAMLError(str(error)) from error


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the YAML file, for editors."""
    return Settings.model_json_schema()


def known_keys() -> list[str]:
    """Return every dotted key, in the order of the file."""
    return list(_walk(Settings, ""))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested sections with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from _walk(field.annotation, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield prefix + key


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(
            f"--set {redacted(override)!r} has no '='", "it is not clear what to set", "write --set section.key=value"
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingsError(
                f"--set {redacted(override)!r}: {section!r} is a value, not a section",
                "the override cannot be applied",
                _nearest(key),
            )
    try:
        tree[last] = plain_yaml(value)
    except yaml.YAMLError:
        tree[last] = value


def _refuse_secrets(tree: Any, key: str) -> None:
    """Refuse passwords, keys and tokens: settings are saved, displayed and shared with the model."""
    if isinstance(tree, str) and redacted(tree) != tree:
        raise SettingsError(
            f"{key} holds a password, key or token: {redacted(tree)}",
            "it would be written to the run's folder and each checkpoint, and sent to the dashboard",
            "pass it to the library that needs it, in an environment variable or the library's own credentials file",
        )
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in parts:
        _refuse_secrets(value, f"{key}.{name}" if key else str(name))


def _explained(error: ValidationError, name: str) -> SettingsError:
    """Return one error that lists all problems: the key, the value found, and what is allowed."""
    lines, remedies = [], []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the settings together"
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
            remedies.append(_nearest(key))
        elif is_section(problem.get("input").__class__) or (problem["type"] == "value_error" and not problem["loc"]):
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "allowed:")
            lines.append(f"{key}: found {problem['input']!r}; {message}")
    return SettingsError(
        f"{name}: " + "; ".join(lines),
        "the run would not be the intended one, so it was not started",
        " ".join(remedies) or "fix the value, or leave the key out to get the default",
    )


def _nearest(key: str) -> str:
    """Return a hint: the known key or section most similar to `key`, or the list of known keys."""
    if "." not in key and (section := difflib.get_close_matches(key, list(Settings.model_fields), n=1)):
        return f"did you mean {section[0]!r}?"
    keys = known_keys()
    by_last = {known.rsplit(".", 1)[-1]: known for known in keys}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    close = close or [by_last[k] for k in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_last), n=1)]
    there = [known for known in keys if known.startswith(f"{key.split('.')[0]}.")] or keys
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(there)}"
