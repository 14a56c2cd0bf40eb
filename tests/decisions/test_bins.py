"""Bins, costs and hazards from a file; decisions; what ends up where, against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wasteddp.decisions.bin_files import load_bins
from wasteddp.decisions.decide import REASONS, BinRules, Hazard, Policy, choose_policy
from wasteddp.decisions.sorting import contents, measure_bins, per_thousand
from wasteddp.decisions.thresholds import ErrorThreshold, RecallThreshold
from wasteddp.errors import DecisionError

CLASSES = ("glass", "paper", "cardboard", "battery")
GOOD = """
name: Example city
classes:
  glass: {bin: glass, grams: 300}
  paper: {bin: paper, grams: 10}
  cardboard: {bin: paper, grams: 100}
  battery: {bin: hazardous, grams: 20, hazard: true, recall: 0.9, confidence: 0.8}
costs:
  wrong: 1
  person: 0.3
  battery: {paper: 50}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "city.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def rules(tmp_path: Path) -> BinRules:
    return load_bins(written(tmp_path, GOOD), CLASSES)


def test_a_file_gives_bins_masses_hazards_and_costs(rules: BinRules) -> None:
    assert rules.name == "Example city"
    assert rules.bins == ("glass", "paper", "hazardous")
    assert rules.bin_of == (0, 1, 1, 2)
    assert rules.grams == (300, 10, 100, 20)
    assert [(one.class_name, one.recall, one.confidence) for one in rules.hazards] == [("battery", 0.9, 0.8)]
    assert rules.costs_KB is not None
    np.testing.assert_array_equal(rules.costs_KB, [[0, 1, 1], [1, 0, 1], [1, 0, 1], [1, 50, 0]])
    assert rules.person == 0.3
    np.testing.assert_allclose(rules.probabilities([[0.1, 0.2, 0.3, 0.4]]), [[0.1, 0.5, 0.4]])


def test_a_plain_map_of_classes_to_bins_is_enough(tmp_path: Path) -> None:
    found = load_bins(written(tmp_path, "glass: 1\npaper: yes\ncardboard: yes\nbattery: hazardous\n"), CLASSES)
    assert found.bins == ("1", "yes", "hazardous")
    assert found.costs_KB is None
    assert BinRules.of_map({"glass": "a"}, ("glass", "paper")).bins == ("a", "paper")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            GOOD.replace("glass: {", "glas: {"),
            "glas: the model has no such class; its classes are glass, paper",
        ),
        (GOOD.replace("  glass: {bin: glass, grams: 300}\n", ""), "the class glass has no bin"),
        (GOOD.replace("bin: glass, ", ""), "classes.glass"),
        (GOOD.replace("bin: glass", "bin: person"), "'person' cannot be a bin's name"),
        (GOOD.replace("wrong: 1", "wrong: -1"), r"costs\.wrong is -1: a cost is a number from 0"),
        (GOOD.replace("50", "-50"), r"costs\.battery\.paper is -50"),
        (GOOD.replace("50", ".nan"), r"costs\.battery\.paper is nan"),
        (
            GOOD.replace("paper: 50", "metal: 50"),
            "no class goes into the bin 'metal'; bins are glass, paper, hazardous",
        ),
        (GOOD.replace("battery: {paper", "phone: {paper"), "costs: the model has no class phone"),
        (GOOD.replace("person: 0.3", "look: 0.3"), r"costs\.look is a number"),
        (GOOD.replace(", grams: 300", ""), "glass has no `grams`, other classes have"),
        (GOOD.replace("recall: 0.9", "recall: 1.5"), "less than 1"),
        (GOOD.replace("hazard: true", "hazzard: true"), "hazzard"),
        (GOOD.replace("hazard: true, ", ""), "battery has a `recall` or `confidence` and no `hazard: true`"),
        (GOOD.replace("person: 0.3", "person: yes"), r"costs\.person"),
        (GOOD.replace("50", ".inf"), r"costs\.battery\.paper is inf: a cost is a number from 0 to 1e12"),
        (GOOD.replace("{bin: paper, grams: 100}", "{bin: Paper, grams: 100}"), "'paper' and 'Paper' would be two"),
        (GOOD.replace("bin: glass", "bin: ' '"), "' ' cannot be a bin's name: it is blank"),
        (GOOD.replace("bin: glass", "bin: Person"), "'Person' cannot be a bin's name"),
        ("- glass\n", "valid dictionary"),
        ("glass: [", "it is not YAML"),
        ("", "the file"),
        ("classes: {}\n", "at least 1 item"),
    ],
)
def test_a_wrong_file_is_one_message(text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match=found) as refused:
        load_bins(written(tmp_path, text), CLASSES)
    assert str(tmp_path) in str(refused.value)


def test_each_rule_decides_in_its_order(rules: BinRules) -> None:
    policy = Policy(
        rules,
        ErrorThreshold(0.6, 0.1, 0.95, 0.05, 100, 80, 1),
        {"battery": RecallThreshold(0.2, 0.9, 0.8, 50, 1)},
    )
    found = policy.decide(
        [
            [0.9, 0.05, 0.05, 0.0],  # glass
            [0.1, 0.4, 0.5, 0.0],  # paper by the sum of two classes
            [0.7, 0.05, 0.0, 0.25],  # a hazard at 25 %
            [0.5, 0.25, 0.25, 0.0],  # paper or glass: a person costs less than 0.5
            [0.65, 0.35, 0.0, 0.0],  # glass costs 0.35: a person costs less
        ]
    )
    assert found.assigned.tolist() == [0, 1, 2, 3, 3]
    assert [REASONS[reason] for reason in found.reasons] == ["", "", "hazard", "cost", "cost"]
    cheap = BinRules(rules.name, rules.classes, rules.bins, rules.bin_of)
    doubtful = Policy(cheap, policy.error).decide([[0.55, 0.45, 0.0, 0.0], [0.65, 0.35, 0.0, 0.0]])
    assert doubtful.assigned.tolist() == [3, 0]
    assert [REASONS[reason] for reason in doubtful.reasons] == ["doubt", ""]


def test_the_bin_of_least_expected_cost_is_that_of_a_loop(rules: BinRules) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(4) * 0.5, 300)
    found = Policy(rules).decide(shares)
    assert rules.costs_KB is not None
    for row, assigned in zip(shares, found.assigned, strict=True):
        costs = [sum(row[k] * rules.costs_KB[k, b] for k in range(4)) for b in range(3)]
        assert assigned == (3 if min(costs) > 0.3 else int(np.argmin(costs)))
    assert {0, 1, 2, 3} == set(found.assigned.tolist())


def test_what_is_in_each_bin_is_that_of_a_loop(rules: BinRules) -> None:
    rng = np.random.default_rng(1)
    labels, assigned = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    counts = contents(labels, assigned, rules)
    assert counts[1, 2] == sum(1 for t, a in zip(labels, assigned, strict=True) if (t, a) == (1, 2))
    for by_mass in (False, True):
        mass = rules.grams if by_mass else (1, 1, 1, 1)
        for number, one in enumerate(measure_bins(labels, assigned, rules, by_mass=by_mass)):
            inside = sum(mass[t] for t, a in zip(labels, assigned, strict=True) if a == number)
            own = sum(
                mass[t] for t, a in zip(labels, assigned, strict=True) if a == number and rules.bin_of[t] == number
            )
            all_own = sum(mass[t] for t in labels if rules.bin_of[t] == number)
            assert one.purity[0] == pytest.approx(own / inside)
            assert one.recovery[0] == pytest.approx(own / all_own)
            assert one.purity[1] < one.purity[0] < one.purity[2]
            assert sum(share for _, share in one.contamination) == pytest.approx(1 - one.purity[0])
    rows = per_thousand(labels, assigned, rules)
    assert sum(row["items"] for row in rows) == pytest.approx(1000)
    assert [row["bin"] for row in rows] == ["glass", "paper", "hazardous", "person"]
    assert rows[3]["wrong"] is None
    everything = measure_bins([0, 0, 0], [0, 0, 0], rules, by_mass=True, groups=[1, 1, 2])[0]
    assert everything.purity == pytest.approx((1.0, 0.342, 1.0), abs=1e-3), "Wilson's of 2 of 2 groups"
    assert measure_bins([0, 0, 0], [0, 0, 0], rules)[0].purity == pytest.approx((1.0, 0.438, 1.0), abs=1e-3)
    empty = measure_bins([], [], rules)[0]
    assert np.isnan(empty.purity[0])
    assert empty.to_json()["purity"] == [None, None, None]


def test_a_policy_keeps_both_promises_on_other_items(rules: BinRules) -> None:
    plain = BinRules(rules.name, rules.classes, rules.bins, rules.bin_of, hazards=rules.hazards)

    def draw(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet(np.ones(4) * 0.08, count)
        return (shares.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1), shares

    test_labels, test_shares = draw(10_000, 10_000)
    own = np.asarray(plain.bin_of)[test_labels]
    broken_error = broken_recall = 0
    for seed in range(1000):
        found = choose_policy(plain, *draw(seed, 800), max_error=0.05, level=0.9).decide(test_shares)
        alone = (found.assigned < 3) & (found.reasons == 0)
        broken_error += (found.assigned != own)[alone].mean() > 0.05
        broken_recall += (found.assigned[test_labels == 3] == 2).mean() < 0.9
    assert broken_error <= 100 + 3 * np.sqrt(1000 * 0.1 * 0.9)
    assert broken_recall <= 200 + 3 * np.sqrt(1000 * 0.2 * 0.8)


def test_hazards_of_two_bins_keep_both_floors() -> None:
    """An item that may be either goes to a person: any one bin would miss the other hazard."""
    hazards = tuple(Hazard(name, 0.9, 0.9) for name in ("battery", "gas"))
    rules = BinRules("", ("other", "battery", "gas"), ("o", "b", "g"), (0, 1, 2), hazards=hazards)

    def draw(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels, logits = rng.integers(0, 3, count), rng.normal(0, 1, (count, 3))
        logits[np.arange(count), labels] += 1.0  # a weak model: many items reach both thresholds
        shares = np.exp(logits)
        return labels, shares / shares.sum(axis=1, keepdims=True)

    labels, shares = draw(10_000, 10_000)
    broken, to_a_bin = np.zeros(2), 0.0
    for seed in range(200):
        policy = choose_policy(rules, *draw(seed, 300))
        found = policy.decide(shares)
        for k in (1, 2):
            broken[k - 1] += np.isin(found.assigned[labels == k], [k, 3]).mean() < 0.9
        reached = policy.reach_hazards(shares)
        np.testing.assert_array_equal(found.assigned[reached.sum(axis=1) == 2], 3)
        np.testing.assert_array_equal(found.assigned[reached[:, 0] & ~reached[:, 1]], 1)
        to_a_bin += np.isin(found.assigned[labels > 0], [1, 2]).mean() / 200
    assert (broken <= 20 + 3 * np.sqrt(200 * 0.1 * 0.9)).all()
    assert to_a_bin > 0.3


def test_a_threshold_of_zero_is_reached_by_a_probability_of_zero() -> None:
    """A softmax of float32 gives 0 to images of the hazard. The floor then holds only if all items are taken for it."""
    rules = BinRules("", ("other", "battery"), ("o", "b"), (0, 1), hazards=(Hazard("battery", 0.9, 0.9),))
    shares = np.array([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 70)
    policy = choose_policy(rules, np.ones(100, int), shares)
    assert policy.hazards["battery"].threshold == 0.0
    assert policy.decide([[1.0, 0.0], [0.5, 0.5]]).assigned.tolist() == [1, 1]


def test_a_hazard_without_images_is_refused(rules: BinRules) -> None:
    with pytest.raises(DecisionError, match="the hazard battery has 0 images"):
        choose_policy(rules, [0, 1, 2], np.eye(4)[[0, 1, 2]])
