"""The model's README.md has what was measured and nothing else; names format nothing; nothing depends on it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from reported_run import sorted_items, write_decisions
from small_run import CARD, random_weights, write_images, write_shards

from wasteddp import cli
from wasteddp.data.manifest import Manifest
from wasteddp.decisions.calibration import calibrate
from wasteddp.errors import inert
from wasteddp.inference.bundle import load_bundle, read_card, replace_card, save_bundle
from wasteddp.inference.model_card.file import write_model_card
from wasteddp.inference.model_card.markup import literal, one_line, table
from wasteddp.tools.verify_run import verify_run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    images = write_images(folder / "images", {"train": (1, 1, 1), "val": (2, 2, 2), "test": (5, 3, 2)})
    manifest = write_shards(folder / "shards", images, dict(CARD.bins))
    run = folder / "my_run"
    save_bundle(run / "model", replace(CARD, hashes=replace(CARD.hashes, manifest=manifest.sha256)), random_weights())
    (run / "settings.yaml").write_text(f"data:\n  shards: {folder / 'shards'}\n")
    assert cli.main(["evaluate", str(run)]) == 0
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "my_run"))


def card_of(run: Path) -> tuple[dict[str, Any], str]:
    """Return the metadata and the text after it."""
    _, head, body = (run / "model" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def shown(body: str) -> str:
    """Return the text that a reader of the rendered Markdown sees, cells divided by |."""
    html = MarkdownIt("commonmark").enable("table").render(body)
    text = re.sub(r"<[^>]+>", "", re.sub(r"</t[hd]>", " | ", html))
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


def test_the_card_has_the_figures_of_the_evaluation(evaluated: Path) -> None:
    metadata, body = card_of(evaluated)
    record = json.loads((evaluated / "evaluations" / "test" / "metrics.json").read_text())
    manifest = Manifest.load(evaluated.parent / "shards")
    assert metadata["pipeline_tag"] == "image-classification"
    assert "license" not in metadata
    assert metadata["datasets"] == [manifest.name]
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "my_run"
    assert result["dataset"]["split"] == "test"
    assert result["dataset"]["args"] == {"sha256": manifest.sha256}
    values = {one["name"]: one["value"] for one in result["metrics"]}
    expected = {"Accuracy": "accuracy", "Macro F1": "macro_f1", "Macro recall": "macro_recall"}
    assert values == {name: pytest.approx(record[key], abs=1e-6) for name, key in expected.items()}
    text = shown(body)
    interval = f"{100 * record['accuracy_low']:.1f} to {100 * record['accuracy_high']:.1f}"
    assert f"test | \n10 | \n{100 * record['accuracy']:.1f} % ({interval})" in text
    assert "glass | \ngreen bin | \n1 | \n2 | \n5 | " in text or "glass | \ngreen bin | \n5 | " in text
    for digest in (manifest.sha256, read_card(evaluated / "model").hashes.weights):
        assert digest in text
    assert "Fewer than 30 images of test are glass (5), metal (3), paper (2)" in text
    assert "The probabilities are not calibrated" in text
    assert "No thresholds were chosen" in text
    assert "The bundle has no summary of its training images" in text


def test_the_metadata_is_what_hugging_face_reads(evaluated: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    data = hub.ModelCard.load(evaluated / "model" / "README.md").data
    record = json.loads((evaluated / "evaluations" / "test" / "metrics.json").read_text())
    assert data.library_name == "wasteddp"
    found = {(one.metric_type, one.dataset_split): one.metric_value for one in data.eval_results}
    assert found["accuracy", "test"] == pytest.approx(record["accuracy"], abs=1e-6)
    assert data.eval_results[0].task_type == "image-classification"


def test_figures_of_other_weights_or_none_are_not_in_it(run: Path) -> None:
    save_bundle(run / "model", read_card(run / "model"), random_weights(seed=4))
    write_model_card(run)
    metadata, body = card_of(run)
    assert "model-index" not in metadata
    assert "These weights were not evaluated yet" in body
    assert "of other weights or cannot be read: 1." in body
    (run / "settings.yaml").unlink()
    write_model_card(run)
    metadata, body = card_of(run)
    assert "datasets" not in metadata
    assert "could not be read when this card was written" in body
    assert "images of" not in body.split("## Classes and bins")[1].split("## Metrics")[0]


def test_calibration_and_decisions_are_in_it_while_they_are_of_this_model(run: Path) -> None:
    found = calibrate(*sorted_items(5, 400), split="val")
    card = read_card(run / "model")
    replace_card(run / "model", replace(card, temperature=found.temperature, calibration=found.to_json()))
    record = write_decisions(run)
    write_model_card(run)
    text = shown(card_of(run)[1])
    ece = [f"{100 * value:.1f}" for value in found.ece_after]
    assert f"{ece[0]} % ({ece[1]} to {ece[2]})" in text
    assert "one view; at temperature 1.0000" in text
    low, high = record["error_alone_interval"]
    measured = f"{100 * record['error_alone']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    assert f"error of what is decided alone | \nat most 5.0 %, confidence 95.0 % | \n{measured}" in text
    assert "recall of the hazard paper | \nat least 90.0 %, confidence 90.0 %" in text
    assert f"round bin | \n{record['bins'][0]['items']}" in text
    replace_card(run / "model", replace(card, temperature=9.0))
    write_model_card(run)
    assert "No thresholds were chosen for these weights and this temperature" in card_of(run)[1]


def test_a_license_is_kept_and_an_edited_card_is_not_written_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "model" / "README.md"
    first = path.read_text()
    path.write_text(first.replace("---\n", "---\nlicense: other\nlicense_name: ours\n", 1))
    assert cli.main(["evaluate", str(run)]) == 0
    assert f"model card: {path}" in " ".join(capsys.readouterr().out.split())
    metadata, _ = card_of(run)
    assert (metadata["license"], metadata["license_name"]) == ("other", "ours")
    assert path.read_text().replace("license: other\nlicense_name: ours\n", "") == first
    for edited in (first.replace("Shard set", "Our shard set"), first + "More.\n", "# Ours\n", ""):
        path.write_text(edited)
        line = write_model_card(run)
        assert (path.read_text() == edited and "was edited" in line) or edited == ""
    path.unlink()
    assert write_model_card(run).startswith("model card: ")
    assert path.read_text() == first


def test_no_figure_depends_on_the_card(run: Path) -> None:
    before = load_bundle(run)[0]
    path = run / "model" / "README.md"
    path.write_text(path.read_text().replace("accuracy", "99 %"))
    assert load_bundle(run)[0] == before
    assert not verify_run(run).damaged
    path.unlink()
    assert load_bundle(run)[0] == before
    assert not verify_run(run).damaged


HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "`code` and **bold** _under_ ~~no~~",
    "![x](http://evil.example/x.png)",
    "[link](javascript:alert(1))",
    "https://evil.example www.evil.example",
    "two\nlines\n---\nlicense: mit",
    "---",
    "yes",
    "1.0",
    "null",
    "- item: {a: [1",
    "# head",
    "key: value # comment",
    "'\"\\",
    "&lt;b&gt; &#60;",
    "\x1b[31mred\u202egnp",
    "\udc80 not utf-8",
    "*anchor &a !!python/object:os.system",
    "纸 métal",
    "<!-- wasteddp: sha256",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    html = MarkdownIt("gfm-like", {"linkify": False}).render(table(["class", "n"], [[literal(name), "1"]]))
    assert set(re.findall(r"</?(\w+)", html)) == {"table", "thead", "tbody", "tr", "th", "td"}
    cell = re.findall(r"<td>(.*?)</td>", html)
    assert len(cell) == 2
    text = cell[0]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    assert text == one_line(name)
    assert inert(one_line(name)) == one_line(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_the_head_is_a_text(name: str, run: Path) -> None:
    """Every name that the card takes from elsewhere is this one."""
    shards = Path(yaml.safe_load((run / "settings.yaml").read_text())["data"]["shards"])
    manifest = Manifest.load(shards)
    valid = name.encode("utf-8", "backslashreplace").decode()  # as a class must be
    bins = dict.fromkeys(CARD.classes, valid)
    card = replace(read_card(run / "model"), classes=(valid, "metal", "paper"), arch="resnet18", bins=bins)
    replace_card(run / "model", card)
    record = json.loads((run / "evaluations" / "test" / "metrics.json").read_text())
    record["options"]["split"] = record["options"]["tta"] = name
    record["classes"][0] = name
    (run / "evaluations" / "test" / "metrics.json").write_text(json.dumps(record))
    write_model_card(run, manifest=replace(manifest, name=name, recipe={"licence": name}))
    metadata, body = card_of(run)
    assert metadata["datasets"] == [one_line(name)]
    assert metadata["model-index"][0]["results"][0]["dataset"]["split"] == one_line(name)
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert not {"script", "img", "a", "em", "strong"} & set(re.findall(r"<(\w+)", html))
    assert "license" not in metadata
