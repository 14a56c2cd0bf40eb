"""The W&B workspace as code: a YAML file, checked against the metrics of runs, and saved on request.

wandb-workspaces (the extra `dashboard`) builds it; the check needs neither that package nor a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wasteddp.errors import SettingsError, TrackingError
from wasteddp.files import read_text
from wasteddp.settings import describe_problems, plain_yaml
from wasteddp.training.tracking.journal import METRICS, is_known
from wasteddp.training.tracking.wandb_client import choose, reason_of
from wasteddp.training.tracking.wandb_sync import MEDIA

DEFAULT_PATH = Path(__file__).resolve().parents[2] / "configs" / "dashboard.yaml"
_OF_WANDB = "system/"  # metrics that W&B's client measures itself
_KINDS = ("lines", "each", "images", "table", "confusion")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Panel(_Part):
    """A panel shows one of `_KINDS`; the other fields are options of curves."""

    title: str
    lines: tuple[str, ...] = ()
    each: str = ""
    images: tuple[str, ...] = ()
    table: str = ""
    confusion: str = ""
    log_y: bool = False
    range: tuple[float, float] | None = None
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    ignore_outliers: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in _KINDS if getattr(self, kind)]
        if len(kinds) != 1:
            raise ValueError(f"the panel {self.title!r} has {' and '.join(kinds) or 'none'} of {', '.join(_KINDS)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics and media of the panel."""
        single = tuple(name for name in (self.each, self.table, self.confusion) if name)
        return self.lines + self.images + single


class Section(_Part):
    name: str
    open: bool = True
    panels: tuple[Panel, ...]


class Dashboard(_Part):
    name: str
    sections: tuple[Section, ...]

    @property
    def num_panels(self) -> int:
        return sum(len(section.panels) for section in self.sections)


def load(path: Path) -> Dashboard:
    """Read a dashboard from a YAML file.

    Raises:
        SettingsError: not YAML, an unknown key, or a panel of a metric that runs do not have: it would stay empty.
    """
    text = read_text(path, "reading the dashboard")
    try:
        dashboard = Dashboard.model_validate(plain_yaml(text))
    except (yaml.YAMLError, ValidationError) as error:
        wrong = describe_problems(error) if isinstance(error, ValidationError) else error
        raise SettingsError(f"{path}: {wrong}", "the dashboard cannot be built", "fix the named lines") from error
    names = {name for section in dashboard.sections for panel in section.panels for name in panel.names}
    unknown = sorted(name for name in names if not _is_shown(name))
    if unknown:
        raise SettingsError(
            f"{path} shows {', '.join(unknown)}, which no run has",
            "the panel would stay empty",
            f"use one of these names: {', '.join([*METRICS, *MEDIA])}",
        )
    return dashboard


def workspace(dashboard: Dashboard, *, entity: str, project: str) -> Any:
    """Convert the dashboard to an object of wandb-workspaces, without sending it.

    Raises:
        TrackingError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise TrackingError(
            f"wandb-workspaces is not installed: {error}",
            "the workspace cannot be built",
            "pip install 'wasteddp[dashboard]', or wandb-workspaces itself",
        ) from error
    sections = [
        ws.Section(name=section.name, is_open=section.open, panels=[_panel(panel) for panel in section.panels])
        for section in dashboard.sections
    ]
    return ws.Workspace(
        entity=entity, project=project, name=dashboard.name, sections=sections, auto_generate_panels=False
    )


def save(dashboard: Dashboard, *, entity: str, project: str) -> str:
    """Create the workspace on W&B and return its address. Each call creates a new one.

    Raises:
        TrackingError: there is no key, W&B does not answer, or it refuses.
    """
    mode = choose("online")
    if not mode.is_online:
        raise _failed(mode.reason)
    import wandb

    try:
        created = workspace(dashboard, entity=entity or str(wandb.Api().default_entity), project=project)
        created.save()
    except TrackingError:
        raise
    except Exception as error:  # wandb raises many kinds of errors
        raise _failed(reason_of(error)) from error
    return str(created.url)


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.images:
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.images), num_columns=4)
    if panel.table:
        return wr.WeavePanelSummaryTable(table_name=panel.table)
    if panel.confusion:
        # W&B's client logs a chart's table under the chart's name with this suffix
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{panel.confusion}_table"}},
            chart_name="wandb/confusion_matrix/v1",
            chart_fields=_CONFUSION_FIELDS,
        )
    low, high = panel.range or (None, None)
    return wr.LinePlot(
        title=panel.title,
        x="Step",
        y=list(panel.lines),
        metric_regex=_regex(panel.each) if panel.each else None,
        log_y=panel.log_y or None,
        range_y=(low, high),
        smoothing_factor=panel.smoothing or None,
        ignore_outliers=panel.ignore_outliers or None,
    )


_CONFUSION_FIELDS = {name: name for name in ("Actual", "Predicted", "nPredictions")}


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", ".*")


def _is_shown(name: str) -> bool:
    return name in METRICS or name in MEDIA or is_known(name) or name.startswith(_OF_WANDB)


def _failed(reason: str) -> TrackingError:
    return TrackingError(
        f"the dashboard was not saved: {reason}", "W&B shows its default panels", "fix this and try again"
    )
