"""`wasteddp lr-find`: the losses are those of a training, the suggestion follows from them, the run is unchanged."""

from __future__ import annotations

import json
from math import inf, log10, nan
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from trainings import config_of, rows

from wasteddp import cli, train
from wasteddp.errors import SettingsError
from wasteddp.tools.lr_find import Options, has_exploded, judged, smoothed


def test_rates_grow_by_one_factor_from_the_first_to_the_last() -> None:
    rates = Options(13, 1e-5, 10).rates()
    assert (rates[0], rates[-1]) == (1e-5, pytest.approx(10))
    assert np.diff(np.log10(rates)) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [Options(9), Options(100, 0.0, 1.0), Options(100, 1.0, 1.0), Options(100, 1, inf)])
def test_what_is_no_range_is_refused(options: Options) -> None:
    with pytest.raises(SettingsError, match=r"--from .* --to .* --steps .*(.|\n)*at least 10 steps"):
        options.rates()


@given(losses=st.lists(st.floats(0, 100), min_size=1, max_size=30), lag=st.floats(0, 20))
def test_a_smoothed_loss_is_the_mean_of_those_before_weighted_by_their_age(losses: list[float], lag: float) -> None:
    decay = lag / (1 + lag)
    for number, found in enumerate(smoothed(losses, lag), start=1):
        weights = [decay**age for age in reversed(range(number))]
        assert found == pytest.approx(np.average(losses[:number], weights=weights), abs=1e-9)


def test_it_has_exploded_above_four_times_the_best_or_where_it_is_no_number() -> None:
    assert not has_exploded([2.0, 1.0, 4.0])
    assert has_exploded([2.0, 1.0, 4.1])
    assert has_exploded([2.0, nan])
    assert has_exploded([2.0, inf])


def curve(bottom: float = 0.1, last: float = 1.0) -> tuple[list[float], list[float]]:
    """A loss that falls by 1 within a decade around 1e-3, and rises again after `bottom`."""
    rates = Options(61, 1e-5, last).rates()
    fall = [1 / (1 + (rate / 1e-3) ** 2) for rate in rates]
    return rates, [1 + down + max(0.0, 8 * log10(rate / bottom)) for rate, down in zip(rates, fall, strict=True)]


def test_a_tenth_of_the_rate_at_the_lowest_loss_is_suggested() -> None:
    rates, losses = curve()
    found = judged(rates, losses, losses, "step 58")
    assert found.lowest_loss_at == pytest.approx(0.1)
    assert found.suggested == pytest.approx(0.01)
    assert found.steepest_at == pytest.approx(1e-3)  # where 1 / (1 + 10^2x) is steepest
    assert found.why == "a tenth of 0.1, where the loss is lowest; above it, the loss rises"


def test_a_fall_within_the_scatter_of_the_steps_is_reported_as_such() -> None:
    rates, smooth = curve()
    for scatter, is_clear in ((0.4, True), (0.6, False)):
        losses = [loss + scatter * (-1) ** step for step, loss in enumerate(smooth)]
        said = f"the smoothed loss fell by 1, and the loss of single steps varies by {scatter:.2g}"
        assert (said not in judged(rates, losses, smooth, "").why) is is_clear


def test_a_loss_that_falls_to_the_end_or_never_names_what_to_do() -> None:
    rates, losses = curve(last=0.01)
    found = judged(rates, losses, losses, "")
    assert found.suggested == found.steepest_at == pytest.approx(1e-3, rel=0.1)
    assert "still fell at the last rate; extend the test with --to" in found.why
    found = judged(rates, losses[::-1], losses[::-1], "")
    assert (found.suggested, found.steepest_at, found.lowest_loss_at) == (None, None, rates[0])
    assert "the loss never fell" in found.why


def lr_find(folder: Path, shards: Path, *more: str) -> Path:
    """Run the test in `folder`. Return the folder of its result."""
    assert cli.main(["lr-find", *config_of(folder, shards), *more]) == 0
    return folder / "run.lr-find"


def test_it_writes_a_curve_a_picture_and_a_table_twice_the_same_and_nothing_into_the_run(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    range_ = ("--steps", "20", "--from", "1e-3", "--to", "1e3")
    out = lr_find(tmp_path, small_shards, *range_)
    said = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run.lr-find"]
    assert sorted(path.name for path in out.iterdir()) == ["lr-find.json", "lr-find.png"]
    assert (out / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "lr-find.json").read_text())
    assert found["stopped"].startswith("step ")
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"]) <= 20
    assert found["smoothed"] == smoothed(found["losses"], 1.0)
    assert (found["precision"], found["micro_batch"], found["settings"]["model"]["arch"]) == ("fp32", 6, "resnet18")
    assert f"suggested: optimizer.lr={found['suggested']:.2g}\n" in said
    assert "    rate      loss  smoothed\n 1.0e-03    " in said
    assert f"written: {out}/lr-find.json" in said
    AcceleratorState._reset_state(reset_partial_state=True)
    lr_find(tmp_path, small_shards, *range_, "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / "lr-find.json").read_text() == (out / "lr-find.json").read_text()


def test_its_losses_are_those_of_a_training(small_shards: Path, tmp_path: Path) -> None:
    same = ["train.epochs=3", "schedule.name=constant", "optimizer.lr=0.01", "augment.mixup=0.2", "data.balance=1"]
    more = [part for setting in same for part in ("--set", setting)]
    out = lr_find(tmp_path, small_shards, *more, "--steps", "12", "--from", "0.01", "--to", "0.0100001")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main([*config_of(tmp_path, small_shards), *more]) == 0
    wanted = [row["train/loss"] for row in rows(tmp_path / "run")]
    assert json.loads((out / "lr-find.json").read_text())["losses"] == pytest.approx(wanted, rel=1e-3)


def test_several_processes_are_refused(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cli.main(["lr-find", *config_of(tmp_path, small_shards)])
    assert ended.value.code == 2
    assert "lr-find was started as 2 processes" in capsys.readouterr().err
