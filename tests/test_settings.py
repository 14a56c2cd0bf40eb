"""Settings: invalid values are refused with a helpful message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wasteddp import settings
from wasteddp.errors import SettingsError

ROOT = Path(__file__).parents[1]


CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "dashboard.yaml")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_printing_a_config_back_is_the_identity(config: Path) -> None:
    loaded = settings.load(config)
    assert settings.parse(loaded.to_yaml()) == loaded
    assert settings.parse(loaded.to_yaml()).to_yaml() == loaded.to_yaml()


def test_the_schema_for_editors_is_the_one_of_the_code() -> None:
    stored = json.loads((ROOT / "configs" / "settings.schema.json").read_text())
    assert stored == settings.json_schema(), "wasteddp settings --schema > configs/settings.schema.json"


def test_an_override_wins_over_the_file() -> None:
    assert settings.parse("optimizer: {lr: 0.1}", ["optimizer.lr=2e-3"]).optimizer.lr == 0.002


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("optimzer: {lr: 1}", [], ["unknown key 'optimzer'", "did you mean 'optimizer'?"]),
        ("train: {batchsize: 3}", [], ["unknown key 'train.batchsize'", "did you mean 'train.batch_size'?"]),
        ("lr: 3", [], ["unknown key 'lr'", "did you mean 'optimizer.lr'?"]),
        ("", ["train.epoch=3"], ["unknown key 'train.epoch'", "did you mean 'train.epochs'?"]),
        ("optimizer: {lr: -0.1}", [], ["optimizer.lr: found -0.1", "greater than 0"]),
        ("optimizer: {lr: .nan}", [], ["optimizer.lr: found nan"]),
        ("precision: fp8", [], ["precision: found 'fp8'", "'auto', 'fp32', 'bf16' or 'fp16'"]),
        ("track: {wandb: off}", [], ["track.wandb: found False", "boolean"]),
        ("train: {epochs: yes}", [], ["train.epochs: found True", "boolean"]),
        ("train: {epochs: 2.5}", [], ["train.epochs: found 2.5", "integer"]),
        ("run: 3", [], ["run: found 3"]),
        ("augment: {crop_scale: [0.9, 0.1]}", [], ["augment.crop_scale: found [0.9, 0.1]", "smaller first"]),
        ("data: {image_size: 64, eval_resize: 32}", [], ["eval_resize 32 is smaller than image_size 64"]),
        ("data: {eval_size: 128, eval_resize: 127}", [], ["eval_resize 127 is smaller than eval_size 128"]),
        ("data: {eval_size: 15}", [], ["eval_size 15 is neither 0 nor from 16 to 2048"]),
        ("train: {epochs: 2}\nschedule: {warmup_epochs: 2}", [], ["warmup_epochs 2 is not below train.epochs 2"]),
        ("model: {weights: none, freeze: layer1}", [], ["freeze is layer1, but weights is none"]),
        ("data: {lanes: 7}", [], ["data.lanes 7 does not divide train.batch_size 256"]),
        ("data: {read_attempts: 20}", [], ["read_attempts 20 x read_timeout_s 30 is more than 400 s"]),
        ("data: {image_size: 64}\ntrain: {epochs: 3}\ndata: {}", [], ["'data' is written twice, in lines 1 and 3"]),
        ("train:\n  epochs: 3\n  epochs: 30", [], ["'epochs' is written twice, in lines 2 and 3"]),
        ("run: {seed: 1:30}", [], ["run.seed: found '1:30'"]),
        ("train.epochs: 3", [], ["unknown key 'train.epochs'", "write 'train' and, indented below it, 'epochs'"]),
        ("run: {seed: 9223372036854775808}", [], ["run.seed: found 9223372036854775808"]),
        ("run: {seed: -1}", ["train.epoch=3"], ["the settings: run.seed: found -1", "--set train.epoch=3: unknown"]),
        ("", ["optimizer.lr=0.1 # tuned"], ["--set optimizer.lr=0.1 # tuned: optimizer.lr: found '0.1 # tuned'"]),
        ("", ["run.seed=1:30"], ["--set run.seed=1:30: run.seed: found '1:30'"]),
        ("", ["data.eval_resize=32"], ["the settings with --set data.eval_resize=32: eval_resize 32 is smaller"]),
        ("", ["data.lanes=7"], ["the settings with --set data.lanes=7: data.lanes 7 does not divide"]),
        ("- 1", [], ["is a list, not a mapping of sections"]),
        ("a: [", [], ["is not YAML"]),
        ("", ["lr"], ["--set 'lr' has no '='"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse(text, overrides)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.out=runs/exp #2", "runs/exp #2"),
        ("run.out='runs/exp #2'", "runs/exp #2"),
        ("run.out=2026", "2026"),
        ("run.out=2026-11-28", "2026-11-28"),
        ("run.out=a: b", "a: b"),
        ("track.entity=no", "no"),
        ("track.entity=", ""),
        ("run.seed=010", 10),
        ("run.seed= 7 ", 7),
        ("optimizer.lr=1e-3", 0.001),
        ("data.workers=4 threads", "4 threads"),
        ("data.workers=4", 4),
        ('track.tags=[010, "b #2", 1:30]', ("010", "b #2", "1:30")),
        ("run.deterministic=yes", True),
    ],
)
def test_an_override_is_taken_as_it_is_written(override: str, expected: object) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(settings.parse("", [override]), section), key) == expected


def test_an_empty_section_has_the_defaults() -> None:
    assert settings.parse("data:\ntrain:\n", ["data.image_size=64"]) == settings.parse("data: {image_size: 64}")


@pytest.mark.parametrize("key", ["run.out", "data.shards", "data.staged", "model.weights", "train.teacher"])
def test_home_is_expanded_in_paths(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = key.partition(".")
    for loaded in (settings.parse("", [f"{key}=~/a b"]), settings.parse(f"{section}: {{{name}: ~/a b}}")):
        assert getattr(getattr(loaded, section), name) == "/home/me/a b"


def test_the_printed_settings_have_their_meanings_and_are_the_same_settings() -> None:
    loaded = settings.parse("track: {tags: [a, 'b #2']}", ["run.out=runs/exp #2"])
    text = settings.explained_yaml(loaded)
    assert settings.parse(text) == loaded
    assert (
        "\n  # The global batch: images in a step, over all processes and micro-batches.\n  batch_size: 256\n" in text
    )


def test_all_mistakes_are_named_together() -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse("optimizer: {lr: -1, momentum: 2}\nrunn: {}")
    assert all(part in caught.value.found for part in ("optimizer.lr", "optimizer.momentum", "'runn'"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="reading the settings: No such file or directory"):
        settings.load(tmp_path / "none.yaml")
