"""The README's first command, as a user runs it, in an environment that is already installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from inspect import ismodule
from pathlib import Path

import pytest
from small_run import write_images

from wasteddp.data.manifest import Manifest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
NARROW = {"PYTHONPATH": os.pathsep.join(map(str, (SUPPORT / "python", SUPPORT))), "TRAININGS": "narrow"}
SMALL = ["--set", "model.arch=resnet18", "--set", "train.epochs=2", "--set", "train.batch_size=32"]
SMALL += ["--set", "run.threads=1"]  # other tests use the cores too: threads would wait for each other


def quickstart(out: Path, *arguments: str, **environment: str) -> str:
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("the tests run in another environment than .venv: see launch/test.sh")
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", *SMALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), "WANDB_MODE": "offline", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_goes_all_the_way_and_a_second_run_reuses_it(tmp_path: Path) -> None:
    first = quickstart(tmp_path, **NARROW)
    run = tmp_path / "runs" / "quickstart"
    metrics = json.loads((run / "evaluations" / "test" / "metrics.json").read_text())
    test_split = Manifest.load(tmp_path / "shards" / "sample").splits["test"]
    assert metrics["num_samples"] == test_split.num_samples == 99
    assert 0 < metrics["accuracy"] <= 1
    assert "the files of this run" in first
    assert len((run / "predictions.csv").read_text().splitlines()) == 13  # two new images of each of six classes
    weights = [path.name for path in (run / "model").glob("*.safetensors")]
    second = quickstart(tmp_path, **NARROW)
    assert "finished at step" in second
    assert [path.name for path in (run / "model").glob("*.safetensors")] == weights


def test_its_program_imports_and_calls_what_exists() -> None:
    [program] = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", (ROOT / "launch/quickstart.sh").read_text(), re.DOTALL)
    tree, names = ast.parse(program), dict[str, object]()
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(list(imports), []), "quickstart.sh", "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and ismodule(names.get(node.value.id)):
            assert hasattr(names[node.value.id], node.attr), ast.unparse(node)


@pytest.mark.slow
def test_the_quickstart_takes_images_of_the_user(tmp_path: Path) -> None:
    images = write_images(tmp_path / "my waste", {"train": (20, 17, 13), "val": (5, 5, 3), "test": (5, 3, 2)})
    said = quickstart(tmp_path / "out", IMAGES=str(images), **NARROW)
    assert "finished at step" in said
    assert "the network starts from the weights: " in said
    run = tmp_path / "out" / "runs" / "quickstart-my waste"
    assert (run / "predictions.csv").exists()
    assert "Test: " in (run / "report.html").read_text()  # written after the evaluation on the test split
    write_images(images, {"train": (21, 17, 13), "val": (5, 5, 3), "test": (5, 3, 2)})
    quickstart(tmp_path / "out", "--overwrite", IMAGES=str(images), **NARROW)
    assert (run.with_name(f"{run.name}-2") / "model" / "model.json").exists()


def test_a_folder_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    script = (ROOT / "launch" / "quickstart.sh").read_text().replace("bash launch/install.sh", ":")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "quickstart.sh").write_text(script)
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=tmp_path, env={**os.environ, "IMAGES": "no such/place"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no no such/place\n  so: ")
