"""The dashboard shows only metrics that runs have, and has the panels of its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb_server import WandbServer

from wasteddp import cli
from wasteddp.errors import SettingsError
from wasteddp.tools import dashboard
from wasteddp.training.tracking.journal import METRICS
from wasteddp.training.tracking.wandb_sync import MEDIA


@pytest.fixture(autouse=True)
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def test_the_dashboard_of_the_project_shows_only_what_runs_have() -> None:
    loaded = dashboard.load(dashboard.DEFAULT_PATH)
    shown = {name for section in loaded.sections for panel in section.panels for name in panel.names}
    assert MEDIA.keys() <= shown
    assert {name for name in shown if not name.startswith("system/")} <= METRICS.keys() | MEDIA.keys()
    assert 4 <= len(loaded.sections) < loaded.num_panels


@pytest.mark.parametrize(
    ("panel", "expected"),
    [
        ("{title: a, lines: [train/los]}", "shows train/los, which no run has"),
        ("{title: a, each: val/recalls/*}", "shows val/recalls/\\*, which no run has"),
        ("{title: a}", "'a' has none of lines, each"),
        ("{title: a, lines: [lr], table: val/mistakes}", "has lines and table of"),
        ("{title: a, lines: [lr], logy: true}", "logy"),
        ("{title: [}", "the dashboard cannot be built"),
    ],
)
def test_a_panel_that_would_stay_empty_is_refused(panel: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "dashboard.yaml"
    path.write_text(f"name: x\nsections:\n- {{name: s, panels: [{panel}]}}\n")
    with pytest.raises(SettingsError, match=expected):
        dashboard.load(path)


def test_checking_needs_no_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dashboard"]) == 0
    said = capsys.readouterr().out
    assert "Is it learning?" in said
    assert "runs have every metric in it" in said


def test_saving_without_a_key_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["dashboard", "--save"])
    assert "the dashboard was not saved: no API key" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces 0.4 with pydantic 2.14
def test_a_saved_dashboard_has_each_panel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["dashboard", "--save", "--project", "waste"]) == 0
    assert server.unknown == []
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("tests", "waste", "wasteddp")
    sent = json.dumps(json.loads(view["spec"]))
    loaded = dashboard.load(dashboard.DEFAULT_PATH)
    for section in loaded.sections:
        assert section.name in sent
        for panel in section.panels:
            for name in panel.names:
                assert name.replace("*", ".*") in sent.replace("\\\\", ""), name
    assert "waste" in capsys.readouterr().out
