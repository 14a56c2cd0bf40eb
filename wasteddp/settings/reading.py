"""Read settings from a YAML file and `--set`. Errors name the wrong key, its value and the most similar known key."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from wasteddp.errors import SettingsError
from wasteddp.files import read_text
from wasteddp.redaction import redacted
from wasteddp.settings.sections import Settings, is_section

_MOST_YAML = 10_000_000  # characters
_TEXT, *_NUMBERS = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float"))
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a YAML file, after applying `section.key=value` overrides.

    Raises:
        SettingsError: not YAML, an unknown key, a wrong type, or an impossible value or combination.
        StorageError: the file cannot be read.
    """
    return parse(read_text(path, "reading the settings"), overrides, name=str(path))


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
    sections = {key for key, field in Settings.model_fields.items() if is_section(field.annotation)}
    tree = {key: {} if value is None and key in sections else value for key, value in tree.items()}
    changed = {_apply(tree, override): override for override in overrides}
    _refuse_secrets(tree, "")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, name, changed) from error


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, since a few lines of them can expand to billions of values, and keys that are written twice.
    Numbers in base 8 (010) and 60 (1:30), which only YAML 1.1 has, are texts."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag in _NUMBERS and _OTHER_BASE.fullmatch(value) else tag

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                lines = f"{first[key.tag, key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value!r} is written twice, in lines {lines}: remove one of them")
        return node


class _TextLoader(_PlainLoader):
    """All values are texts, as they are written: yes, no, 1 and 010 too."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


def plain_yaml(text: str, *, as_text: bool = False) -> Any:
    """Return the content of an untrusted YAML file: plain values, no Python objects, no aliases, no endless nesting.

    Args:
        as_text: return each value as a text, as it is written.

    Raises:
        yaml.YAMLError: the text is not such a file, or is too large.
    """
    if len(text) > _MOST_YAML:
        raise yaml.YAMLError(f"{len(text):,} characters; the limit is {_MOST_YAML:,}")
    try:
        return (_TextLoader if as_text else _PlainLoader)(text).get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits, the date 2024-13-45
        raise yaml.YAMLError(str(error)) from error


def explained_yaml(settings: Settings) -> str:
    """Every setting in YAML, each below its meaning. `parse` of it gives these settings again."""
    return "\n".join(_explained_lines(settings, "")) + "\n"


def _explained_lines(section: BaseModel, indent: str) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        if is_section(field.annotation):
            yield from ("", f"{key}:", *_explained_lines(getattr(section, key), "  "))
        else:
            meaning = textwrap.wrap(field.description or "", 100, break_on_hyphens=False, break_long_words=False)
            yield from (f"{indent}# {line}" for line in meaning)
            value = section.model_dump(mode="json", include={key})
            dumped = yaml.safe_dump(value, allow_unicode=True, width=1000)
            yield from textwrap.indent(dumped, indent).splitlines()


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


def _apply(tree: dict[str, Any], override: str) -> str:
    """Put one value of --set into the tree, and return its key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(
            f"--set {redacted(override)!r} has no '='", "it is not clear what to set", "write --set section.key=value"
        )
    key = key.strip()
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise SettingsError(
                f"--set {redacted(override)!r}: {section!r} is a value, not a section",
                "the override cannot be applied",
                _nearest(key),
            )
    tree[last] = _value_of(key, value.strip())
    return key


def _value_of(key: str, text: str) -> Any:
    """Return a value of --set: the text itself for a setting that takes text, else what YAML reads from all of it."""
    is_quoted = text[:1] in ("'", '"')
    if not is_quoted and _takes_text(key):
        return text
    try:
        node = yaml.compose(text, _PlainLoader)
        is_cut = node is not None and node.end_mark.index < len(text)  # by a comment
        return text if is_cut else plain_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return text


def _takes_text(key: str) -> bool:
    section: Any = Settings
    for part in key.split("."):
        field = section.model_fields.get(part) if is_section(section) else None
        section = field.annotation if field else None
    return section is str


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


def describe_problems(error: ValidationError) -> str:
    """Return each key of a file that is wrong, and why, in one line."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())


def _explain(error: ValidationError, name: str, changed: Mapping[str, str]) -> SettingsError:
    """Return one error that lists all problems: the file or the --set of `changed`, key, value, and what is allowed."""
    lines, remedies = dict[str, list[str]](), []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the settings together"
        own = [text for known, text in changed.items() if f"{key}.".startswith(f"{known}.")]
        inside = [text for known, text in changed.items() if not problem["loc"] or known.startswith(f"{key}.")]
        sets = " ".join(f"--set {redacted(text)}" for text in own or inside)
        where = sets if own else f"{name} with {sets}" if inside else name
        if problem["type"] == "extra_forbidden":
            line = f"unknown key {key!r}"
            is_dotted = len(problem["loc"]) == 1 and key in known_keys()
            section, _, last = key.partition(".")
            remedies.append(f"write {section!r} and, indented below it, {last!r}" if is_dotted else _nearest(key))
        elif problem["type"] == "value_error" and isinstance(problem["input"], (dict, BaseModel)):
            line = problem["msg"].removeprefix("Value error, ")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "allowed:")
            line = f"{key}: found {problem['input']!r}; {message}"
        lines.setdefault(where, []).append(line)
    return SettingsError(
        "; ".join(f"{where}: {'; '.join(wrong)}" for where, wrong in lines.items()),
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
