"""Settings from a YAML file and `--set`; what is wrong is refused with what was found and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from wasteddp.errors import SettingsError, storage
from wasteddp.redaction import redacted
from wasteddp.settings.sections import Settings, is_section

_MOST_YAML = 10_000_000  # characters


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a YAML file, with `section.key=value` overrides on top.

    Raises:
        SettingsError: unreadable, not YAML, an unknown key, a wrong type, an impossible value or combination.
    """
    with storage("reading the settings", path):
        text = Path(path).read_text(encoding="utf-8")
    return parse(text, overrides, name=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, name: str = "the settings") -> Settings:
    """As `load`, from a text."""
    try:
        tree = plain_yaml(text) or {}
    except yaml.YAMLError as error:
        found = f"{name} is not YAML: {redacted(str(error))}"
        raise SettingsError(found, "no setting can be read", "fix the line named") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{name} is a {type(tree).__name__}, not sections of settings", "nothing can be set", "")
    for override in overrides:
        _apply(tree, override)
    _refuse_secrets(tree, "")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, name) from error


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them can name billions of values, and no file of ours needs one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """What a YAML file from elsewhere says: plain values only, no Python objects, no aliases, no endless nesting.

    Raises:
        yaml.YAMLError: it is something else, or too much.
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
    """JSON Schema of the YAML file, for editors."""
    return Settings.model_json_schema()


def known_keys() -> list[str]:
    """Every dotted key, in the order of the file."""
    return list(_walk(Settings, ""))


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
                f"--set {redacted(override)!r}: {section!r} is a value, not a section", "", _nearest(key)
            )
    try:
        tree[last] = plain_yaml(value)
    except yaml.YAMLError:
        tree[last] = value


def _refuse_secrets(tree: Any, key: str) -> None:
    """Settings are saved, shown and passed on with the model: a password in them would be too."""
    if isinstance(tree, str) and redacted(tree) != tree:
        raise SettingsError(
            f"{key} holds a password, key or token: {redacted(tree)}",
            "it would be in the run's folder, in each checkpoint and on the dashboard",
            "give it to the library that needs it by its environment variables or its own file of credentials",
        )
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in parts:
        _refuse_secrets(value, f"{key}.{name}" if key else str(name))


def _explained(error: ValidationError, name: str) -> SettingsError:
    """All that is wrong, a line each: key, what was found, what is allowed."""
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
        "the run would not be the one that was meant, so nothing was started",
        " ".join(remedies) or "fix the value, or leave the key out to get the default",
    )


def _nearest(key: str) -> str:
    """The known key or section that was probably meant."""
    if "." not in key and (section := difflib.get_close_matches(key, list(Settings.model_fields), n=1)):
        return f"did you mean {section[0]!r}?"
    keys = known_keys()
    by_last = {known.rsplit(".", 1)[-1]: known for known in keys}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    close = close or [by_last[k] for k in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_last), n=1)]
    there = [known for known in keys if known.startswith(f"{key.split('.')[0]}.")] or keys
    return f"did you mean {close[0]!r}?" if close else f"keys there are: {', '.join(there)}"
