"""Secrets are redacted, and other words are unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from wasteddp import settings, train
from wasteddp.errors import SettingsError
from wasteddp.redaction import redacted, redacted_tree

PLANTED = "Zq8-planted-secret-71"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://user:{PLANTED}@host/set", "https://[hidden]@host/set"),
        (f"s3://AKIDAKIDAKIDAKID:{PLANTED}@bucket", "s3://[hidden]@bucket"),
        ("https://0123456789abcdef0123@host/repo.git", "https://[hidden]@host/repo.git"),
        (f"https://h/x?a=1&X-Amz-Signature={PLANTED}&b=2", "https://h/x?a=1&X-Amz-Signature=[hidden]&b=2"),
        (f"https://h/x?sig={PLANTED}", "https://h/x?sig=[hidden]"),
        ("a hf_abcdefghijklmnopqrstuv b", "a [hidden] b"),
        ("AKIAABCDEFGHIJKLMNOP", "[hidden]"),
        (f"--set x={PLANTED}", "--set x=[hidden]"),
    ],
)
def test_a_secret_is_hidden(text: str, expected: str) -> None:
    assert redacted(text, {"MY_API_TOKEN": PLANTED}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "shards/trashnet",
        "https://host:8080/set?page=2",
        "https://user@host/set",
        "mail@example.org: at 10:30",
        "/home/me/credentials.json",
        "the monkey is short",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    environment = {"GOOGLE_CREDENTIALS": "/home/me/credentials.json", "MONKEY": "monkey", "PLACE": "shards/trashnet"}
    assert redacted(text, environment) == text


def test_lists_and_mappings_are_searched() -> None:
    tree = {"a": [f"s3://u:{PLANTED}@b", 1], "b": {"c": None}}
    assert redacted_tree(tree, {}) == {"a": ["s3://[hidden]@b", 1], "b": {"c": None}}


def test_a_secret_in_the_settings_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    for text, key in (
        (f"data: {{shards: 's3://me:{PLANTED}x@bucket/set'}}", "data.shards"),
        (f"track: {{tags: [cpu, {PLANTED}]}}", "track.tags.1"),
    ):
        with pytest.raises(SettingsError, match=rf"{key} holds a password, key or token") as caught:
            settings.parse(text)
        assert PLANTED not in str(caught.value)


def test_a_secret_on_the_command_line_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {arch: resnet18}")
    wanted = f"data.shards=https://me:{PLANTED}@host/set"
    assert train.main(["--config", "config.yaml", "--set", wanted, "--set", "optimizer.lr=-1"]) == 2
    said = capsys.readouterr()
    assert "https://[hidden]@host/set" in said.err
    assert PLANTED not in said.out + said.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
