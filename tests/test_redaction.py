"""Secrets are redacted, and other words are unchanged."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, quote_plus

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


FORMS = [
    "https://user:{}@host/set", "s3://user:{}@bucket/a", "https://user:a/{}@host/set", "https://user:a@{}@host/x",
    "https://user:{}/b@host", "postgres://u:{}@db:5432/x", "https://h/x?token={}", "https://h/x?a=1&password={}",
    "https://h/x?api_key={}&b", "https://h/x?auth={}", "https://h/x?X-Amz-Security-Token={}", "https://h/x?pwd={}",
    "password={}", "DB_PWD={}", "--set secret={}", "auth={}", "token={}; next", "AccountKey={}", "my_access_key={}",
    "PASSPHRASE={}", "Authorization: Bearer {}", "authorization: basic {}", "bearer {}", '{{"password": "{}"}}',
    "{{'token': '{}'}}", "password: {}", "  api_key: {}", '"secret": "{}"', "db_password: '{}'",
]  # fmt: skip
KEYS = [
    "hf_abcdefghijklmnopqrstuv", "ghp_abcdefghijklmnopqrstuv", "github_pat_abcdefghijklmnopqrstuv",
    "glpat-abcdefghijklmnopqr", "ASIAABCDEFGHIJKLMNOP", "sk-abcdefghijklmnopqrstuv", "sk_live_abcdefghijklmnop",
    "xoxb-1234567890-abc", "AIzaabcdefghijklmnopqrstuvwxyz0123456", "ya29.abcdefghijklmnopqrstuv",
    "npm_abcdefghijklmnopqrstuvwxyz0123", "pypi-abcdefghijklmnopqrstuv", "wandb_v1_abcdefghijklmnopqrstuv",
    "SG.abcdefghijklmnopqr.abcdefghijklmnopqr", "eyJhbGciOiJI.eyJzdWIiOiIx.abcdefghijk",
    "hooks.slack.com/services/T000/B000/XXXX",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip
NAMES = [
    "API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TOKEN", "DB_PWD", "DB_PASSWORD", "SSH_PASSPHRASE", "PROXY_AUTH",
    "SENTRY_DSN", "GCP_CREDENTIAL", "X_BEARER",
]  # fmt: skip
VALUES = [PLANTED, "/Zq8+planted/se cret71abcd", "a@b/c:Zq8planted?x=1", "Zq8%planted secret"]


@pytest.mark.parametrize("form", FORMS)
def test_a_value_with_a_telling_name_is_hidden(form: str) -> None:
    text = redacted(f"before\n{form.format(PLANTED)}", {})
    assert PLANTED not in text
    assert redacted(text, {}) == text


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_a_known_service_is_hidden(key: str) -> None:
    text = redacted(f"before {key} after", {})
    assert text == "before [hidden] after"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", VALUES)
def test_the_value_of_a_secret_variable_is_hidden_in_every_encoding(name: str, value: str) -> None:
    for form in (value, quote(value), quote(value, safe=""), quote_plus(value)):
        text = redacted(f"before {form} after", {name: value})
        assert form not in text
        assert text.endswith(" after")


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "GIT_AUTHOR_NAME"])
def test_other_variables_are_not_hidden(name: str) -> None:
    assert redacted("in /gone/some folder/x", {name: "/gone/some folder"}) == "in /gone/some folder/x"


@pytest.mark.parametrize(
    "text",
    [
        "shards/trashnet",
        "http://localhost:8000/set@v1/train-000000.tar",
        "hf://datasets/owner/waste@main/train-000000.tar",
        "--label-key is given and --class-key is not",
        "the token has ended; keys: glass, metal",
        "basic understanding and a bearer",
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
