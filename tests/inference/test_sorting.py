"""Decisions at evaluate and predict: the files, what they say, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_run import CARD, CLASSES, random_weights, write_images, write_shards

from wasteddp import cli
from wasteddp.decisions.decide import BinRules, Hazard, choose_policy
from wasteddp.errors import DecisionError
from wasteddp.inference.bundle import save_bundle
from wasteddp.inference.policy_files import ChosenPolicy, load_policy, save_policy
from wasteddp.inference.sorting import _lines, decisions_record, measure_policy

BINS = "name: Example city\nclasses: {glass: round bin, metal: flat bin, paper: flat bin}\ncosts: {person: 0.4}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sorting")
    counts = {"train": (1, 1, 1), "val": (4, 4, 4), "test": (5, 3, 2)}
    write_shards(folder / "shards", write_images(folder / "images", counts), dict(CARD.bins))
    save_bundle(folder / "run" / "model", CARD, random_weights())
    (folder / "run" / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    (folder / "bins.yaml").write_text(BINS)
    return folder / "run"


def evaluation(seed: int, count: int) -> Any:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3) * 0.05, count)
    labels = (shares.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return SimpleNamespace(labels=labels, probabilities_NK=shares, seen=SimpleNamespace(split="test"))


def test_evaluate_names_where_items_go_and_predict_decides_by_it(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["evaluate", str(run), "--bins", str(run.parent / "bins.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "bins of Example city" in said
    assert "of 1,000 items like these: " in said
    record = json.loads((run / "evaluations" / "test" / "decisions.json").read_text())
    assert record["items"] == 10
    assert sum(row["items"] for row in record["per_thousand"]) == pytest.approx(1000)
    assert [one["bin"] for one in record["bins"]] == ["round bin", "flat bin"]
    policy = run / "evaluations" / "test" / "policy.json"
    photos = str(run.parent / "images" / "test")
    out = [str(tmp_path / name) for name in ("a.csv", "a.json")]
    assert cli.main(["predict", str(run), photos, "--policy", str(policy), "--csv", out[0], "--json", out[1]]) == 0
    assert "decisions: " in capsys.readouterr().out
    with Path(out[0]).open() as file:
        rows = list(csv.DictReader(file))
    entries = json.loads(Path(out[1]).read_text())["predictions"]
    assert len(rows) == len(entries) == 10
    counts = {row["bin"]: round(row["items"] / 100) for row in record["per_thousand"]}
    found = [row["decision"] for row in rows]
    assert {name: found.count(name) for name in counts} == counts, "predict decides as evaluate did"
    assert cli.main(["evaluate", str(run)]) == 0
    assert policy.exists(), "predict may use it"
    assert not policy.with_name("decisions.json").exists(), "this evaluation made no decisions"
    for row, entry in zip(rows, entries, strict=True):
        of_bin = {"round bin": float(row["p_glass"]), "flat bin": float(row["p_metal"]) + float(row["p_paper"])}
        assert float(row["bin_probability"]) == pytest.approx(max(of_bin.values()), abs=1e-5)
        expected = (max(of_bin, key=of_bin.__getitem__), "")
        if 1 - max(of_bin.values()) > 0.4:
            expected = ("person", "cost")
        assert (row["decision"], row["why"]) == expected
        assert (entry["decision"], entry["why"]) == (row["decision"], row["why"])


def test_a_promise_that_few_images_cannot_keep_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(run), "--max-error", "0.02"])
    assert "no threshold on 12 images keeps the error at 0.02" in capsys.readouterr().err


def test_thresholds_are_chosen_on_the_split_that_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["evaluate", str(run), "--split", "val", "--max-error", "0.99"]
    assert cli.main([*given, "--choose-on", "test"]) == 0
    assert "the promise of 99.0 %, chosen on test, held here" in " ".join(capsys.readouterr().out.split())
    record = json.loads((run / "evaluations" / "val" / "decisions.json").read_text())
    assert (record["chosen_on"], record["selected"], record["policy"]["error"]["num_samples"]) == ("test", False, 10)
    card = run / "model" / "README.md"
    assert "at most 99" in card.read_text()
    for refused, said in (
        ([*given, "--choose-on", "train"], "the model was trained on the images of train"),
        ([*given[:4], "--choose-on", "test"], "--choose-on test was given without --bins and --max-error"),
        ([*given[:4], "--confidence", "0.9"], "--confidence was given without --max-error"),
        ([*given, "--choose-on", "night"], "has no images in a split called 'night'; its splits: train, val"),
        ([*given, "--policy", str(run / "policy.json")], "--policy was given with --max-error"),
        ([*given[:-1], "0.001"], "no threshold on 12 images"),
    ):
        with pytest.raises(SystemExit):
            cli.main(refused)
        assert said in capsys.readouterr().err
    assert "at most 99" not in card.read_text(), "its decisions were removed with the evaluation"


def test_a_policy_is_measured_on_another_split_and_on_the_set_of_another_site(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(run), "--max-error", "0.99"]) == 0
    policy = Path(shutil.copy(run / "evaluations" / "test" / "policy.json", tmp_path / "policy.json"))
    first = json.loads((run / "evaluations" / "test" / "decisions.json").read_text())
    options = ["evaluate", str(run), "--policy", str(policy)]
    assert cli.main(options) == 0
    again = json.loads((run / "evaluations" / "test" / "decisions.json").read_text())
    assert again == first
    assert (run / "evaluations" / "test" / "policy.json").read_bytes() == policy.read_bytes()
    assert cli.main([*options, "--split", "val"]) == 0
    assert "the thresholds were chosen on these images of val" in " ".join(capsys.readouterr().out.split())
    photos = run.parent / "images" / "test"
    site = ["shard", str(photos), "--out", str(tmp_path / "site"), "--classes-from", str(run), "--fractions", "0,1,0"]
    assert cli.main(site) == 0
    capsys.readouterr()
    assert cli.main([*options, "--split", "val", "--shards", str(tmp_path / "site")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the thresholds were chosen on these images" not in said
    record = json.loads((run / "evaluations" / "val" / "decisions.json").read_text())
    assert (record["chosen_on"], record["items"]) == ("val of shards", 10)
    assert record["policy"] == first["policy"]
    for words, found in (
        (["--images", str(photos), "--policy", str(policy)], "--policy was given with --images"),
        (["--images", str(photos), "--split", "val"], "--split was given with --images"),
        (["--images", str(photos), "--confidence", "0.9"], "--confidence was given with --images"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", str(run), *words])
        assert found in capsys.readouterr().err


def test_names_are_printed_as_they_are(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bins = tmp_path / "bins.yaml"
    bins.write_text('name: "[/x]"\nclasses: {glass: "[red]a", metal: "b\\e[2J", paper: "[/]"}\n')
    assert cli.main(["evaluate", str(run), "--bins", str(bins)]) == 0
    said = capsys.readouterr().out
    assert "\x1b[2J" not in said
    for name in ("[/x]", "[red]a", "[/]", "\\x1b[2J"):
        assert name in said


def test_a_promise_on_items_that_nobody_decides_alone_is_mentioned() -> None:
    policy = choose_policy(BinRules("", CLASSES, CLASSES, (0, 1, 2)), [0] * 99, np.eye(3)[[0] * 99], max_error=0.1)
    record = decisions_record(
        policy,
        [0],
        np.array([[0.4, 0.3, 0.3]]),
        model={},
        split="test",
        chosen_on="val",
        groups=None,
        chosen_groups=None,
    )
    assert "decided alone: none of the items; the promise of 10.0 %, chosen on val, says nothing here" in _lines(record)


def test_a_class_called_person_needs_bins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = replace(CARD, classes=("glass", "metal", "person"), bins={})
    save_bundle(tmp_path / "run" / "model", card, random_weights())
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "run"), "--shards", str(tmp_path), "--max-error", "0.5"])
    assert "'person' is the name of a bin, or of a class without one" in capsys.readouterr().err


def test_the_bins_file_is_read_before_the_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bins.yaml").write_text("glas: bin\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", str(run), "--bins", str(tmp_path / "bins.yaml")])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "glas: the model has no such class" in printed.err
    assert "accuracy" not in printed.out


def test_a_policy_is_the_same_after_it_was_saved_and_only_for_its_model(tmp_path: Path) -> None:
    rules = BinRules("city", CLASSES, ("a", "b"), (0, 1, 1), hazards=(Hazard("paper", 0.9, 0.9),), person=0.4)
    val, test = evaluation(0, 1000), evaluation(1, 3000)
    policy = choose_policy(rules, val.labels, val.probabilities_NK, max_error=0.05)
    path = tmp_path / "policy.json"
    save_policy(path, ChosenPolicy(policy, "val"), CARD, tta="none")
    again = load_policy(path, CARD, tta="none")
    one, other = policy.decide(test.probabilities_NK), again.decide(test.probabilities_NK)
    np.testing.assert_array_equal(one.assigned, other.assigned)
    np.testing.assert_array_equal(one.reasons, other.reasons)
    record = measure_policy(policy, test.labels, test.probabilities_NK, split="test")
    own = np.asarray(rules.bin_of)[test.labels]
    alone = [i for i in range(3000) if one.assigned[i] < 2 and one.reasons[i] == 0]
    assert record["decided_alone"] == pytest.approx(len(alone) / 3000)
    assert record["error_alone"] == pytest.approx(sum(one.assigned[i] != own[i] for i in alone) / len(alone))
    assert record["hazards"]["paper"]["images"] == int((test.labels == 2).sum())
    assert record["hazards"]["paper"]["recall"] > 0.85
    with pytest.raises(DecisionError, match=r"for another model: tta 'none' instead of 'flip'"):
        load_policy(path, CARD, tta="flip")
    with pytest.raises(DecisionError, match=r"for another model: temperature 1\.0 instead of 2\.0"):
        load_policy(path, replace(CARD, temperature=2.0), tta="none")
    for text in ("{", "[]", "{}", path.read_text().replace('"threshold"', '"limit"')):
        path.write_text(text)
        with pytest.raises(DecisionError, match="is not a policy of wasteddp"):
            load_policy(path, CARD, tta="none")


@pytest.mark.parametrize("number", ['"0.5"', "NaN", "-0.1", "1.5", "true", "null"])
def test_a_threshold_that_is_no_share_is_refused(number: str, tmp_path: Path) -> None:
    """With NaN, no item would be in doubt, and none a hazard."""
    rules = BinRules("city", CLASSES, ("a", "b"), (0, 1, 1), hazards=(Hazard("paper", 0.9, 0.9),))
    val = evaluation(0, 1000)
    policy = choose_policy(rules, val.labels, val.probabilities_NK, max_error=0.05)
    path = tmp_path / "policy.json"
    save_policy(path, ChosenPolicy(policy, "val"), CARD, tta="none")
    for threshold in (policy.error.threshold, policy.hazards["paper"].threshold):  # type: ignore[union-attr]
        text = path.read_text()
        path.write_text(text.replace(f'"threshold": {threshold}', f'"threshold": {number}'))
        with pytest.raises(DecisionError, match="is not a policy of wasteddp"):
            load_policy(path, CARD, tta="none")
        path.write_text(text)


def test_an_item_of_another_hazard_in_the_same_bin_is_no_false_alarm() -> None:
    rules = BinRules(
        "", CLASSES, ("plain", "hazards"), (0, 1, 1), hazards=(Hazard("metal", 0.5, 0.5), Hazard("paper", 0.5, 0.5))
    )
    shares = np.array([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1], [0.9, 0.05, 0.05]])
    policy = choose_policy(rules, [1, 2], shares[:2])
    record = measure_policy(policy, [1, 2, 0, 0], np.r_[shares[:2], [[0.1, 0.85, 0.05]], shares[3:]], split="test")
    assert [record["hazards"][name]["false_alarms"] for name in ("metal", "paper")] == [1, 0]
    assert record["hazards"]["metal"]["share_of_false_alarms"] == 0.5
    assert record["hazard_decisions"] == 3
    other = replace(rules, bins=("plain", "hazards", "paper"), bin_of=(0, 1, 2))
    both = measure_policy(
        choose_policy(other, [1, 2], shares[:2]), [1], np.array([[0.0, 0.8, 0.8]]), split="test"
    )  # may be either: a person, and found
    assert both["to_a_person"] == {"hazard": 1, "cost": 0, "doubt": 0}
    assert (both["hazard_decisions"], both["hazards"]["metal"]["recall"]) == (0, 1.0)


@pytest.mark.parametrize("option", [["--bins", "bins.yaml"], ["--max-error", "0.05"]])
def test_decisions_on_images_without_a_split_are_refused_and_not_ignored(
    option: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(run), "--images", str(run.parent / "images"), *option])
    assert f"{option[0]} was given with --images" in capsys.readouterr().err


def test_thresholds_that_are_chosen_and_measured_on_the_same_images_are_reported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(run), "--split", "val", "--max-error", "0.95"]) == 0
    assert "the thresholds were chosen on these images of val" in " ".join(capsys.readouterr().out.split())
