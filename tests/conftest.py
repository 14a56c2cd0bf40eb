"""Fixtures of several tests: small real files, and short trainings."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import narrow
import pytest
from pictures import jpeg

_real: dict[str, Any] = {}  # the originals that `_small_trainings` replaces
TRASHNET = Path(__file__).parents[2] / "shared" / "data" / "trashnet"
TESTS = Path(__file__).parent
FIRST = ("launch", "training", "tools", "sharding")  # they have the longest files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, so that no worker waits for one at the end; pytest sorts paths of its command line."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(TESTS).parts[0], len(FIRST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what imports created out of garbage collection: with torch, looking at all of it takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_configure() -> None:
    """Restore the SIGINT handler: a shell ignores SIGINT in background jobs, and programs inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile("untimed", deadline=None)  # a loaded machine is not a fault
    hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate has one state per process, with the precision of its first use."""
    yield
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _small_trainings() -> Iterator[None]:
    """Trainings of this process use a narrow network, and write no report.html, which would take 2 s each."""
    if "torch" not in sys.modules:  # no selected test trains; the fast tests start without torch
        yield
        return
    from wasteddp.training import run_folder

    _real.update(network=narrow.install(), report=run_folder.write_report_within)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "write_report_within", lambda limit_s, run: "report: left out in tests")
        yield
    narrow.restore(_real["network"])


@pytest.fixture(scope="module")
def full_width() -> Iterator[None]:
    """The networks of torchvision at full width; a module requests them in its `pytestmark`."""
    from torchvision.models import resnet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "ResNet", _real["network"])
        yield


@pytest.fixture(scope="module")
def reports() -> Iterator[None]:
    """Trainings of this module write their reports."""
    from wasteddp.training import run_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "write_report_within", _real["report"])
        yield


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that wasteddp starts are forked, and have a narrow network."""
    import forked
    from trainings import PROGRAM

    from wasteddp.training.distributed import launcher

    monkeypatch.setattr(launcher, "subprocess", forked)
    monkeypatch.setattr(launcher, "PROGRAM", PROGRAM)


@pytest.fixture
def trashnet_zip() -> Path:
    path = TRASHNET / "trashnet.zip"
    if not path.exists():
        pytest.skip("the TrashNet images are not on this machine")
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `tmp_path/images/CLASS/CLASS<n>.jpg`, a given number of each class; all images differ."""

    def make(counts: Mapping[str, int] | None = None, name: str = "images") -> Path:
        seed = 0
        for class_name, count in (counts or {"glass": 12, "metal": 10, "paper": 11}).items():
            (tmp_path / name / class_name).mkdir(parents=True)
            for number in range(1, count + 1):
                seed += 1
                (tmp_path / name / class_name / f"{Path(class_name).name}{number}.jpg").write_bytes(jpeg(seed))
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set for short trainings: 3 classes, 50 train, 13 val and 10 test images of 48x40 px, several shards."""
    from small_run import write_images

    from wasteddp.sharding.build import Job, Options, make_shards

    folder = tmp_path_factory.mktemp("small")
    source = write_images(folder / "images", {"train": (20, 17, 13), "val": (5, 5, 3), "test": (5, 3, 2)})
    make_shards(Job(source, folder / "shards", Options(shard_mb=0.02)), workers=2)
    return folder / "shards"
