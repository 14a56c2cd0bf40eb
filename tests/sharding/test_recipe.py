"""Recipes: reading them, downloading images, drawing images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import Fault, FaultyServer, serving
from PIL import Image

from wasteddp.cli import main
from wasteddp.data.manifest import Manifest
from wasteddp.data.remote import folder as remote
from wasteddp.errors import RecipeError
from wasteddp.sharding import recipe as recipes
from wasteddp.sharding.build import Options
from wasteddp.sharding.recipe import Download, fetch
from wasteddp.sharding.sources import synthetic

SHARDS = Path(__file__).parents[2] / "shards"
CONTENT = bytes(range(256)) * 40
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RANGE_BYTES", 3000)  # CONTENT takes four


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.zip").write_bytes(CONTENT)
    with serving(tmp_path / "served", ranges=request.param) as running:
        yield running


def get(server: FaultyServer, folder: Path, **checks: object) -> Path:
    wanted = Download(url=f"{server.url}/a.zip?raw=1", file="b.zip", **({"git_blob": BLOB} | checks))
    return fetch(wanted, folder, allow_http_loopback=True, wait=lambda seconds: None)


def test_a_download_is_checked_and_not_repeated(server: FaultyServer, tmp_path: Path) -> None:
    checks = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size_bytes": len(CONTENT)}
    for _ in range(2):
        assert get(server, tmp_path / "new", **checks).read_bytes() == CONTENT
        assert server.bytes_sent == {"/a.zip?raw=1": len(CONTENT)}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.zip"]


@pytest.mark.parametrize("fault", ["cut", "503"])
def test_a_download_that_breaks_goes_on(server: FaultyServer, tmp_path: Path, fault: Fault) -> None:
    faults = [None, fault]
    server.faults = lambda name, number: faults.pop(0) if faults else None
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size_bytes", [None, len(CONTENT)])
def test_a_download_that_was_begun_goes_on(server: FaultyServer, tmp_path: Path, size_bytes: int | None) -> None:
    (tmp_path / "b.zip.part").write_bytes(CONTENT[:3001])
    assert get(server, tmp_path, size_bytes=size_bytes).read_bytes() == CONTENT
    assert sum(server.bytes_sent.values()) == len(CONTENT) - (3001 if server.ranges else 0)
    (tmp_path / "b.zip").rename(tmp_path / "b.zip.part")
    assert get(server, tmp_path, size_bytes=size_bytes).read_bytes() == CONTENT


def test_a_download_of_a_size_that_nobody_knows(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.RemoteFolder, "_size", lambda folder, name: None)
    (tmp_path / "b.zip.part").write_bytes(b"x" * 20_000)
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"sha256": "0" * 64}, "sha256 .* instead of 0000"),
        ({"git_blob": "1" * 40}, "git_blob .* instead of 1111"),
        ({"size_bytes": 7}, "10,240 bytes instead of 7"),
        ({"size_bytes": 10_241}, "10,240 bytes instead of 10,241"),
    ],
)
def test_other_bytes_than_promised_are_refused_and_removed(
    server: FaultyServer, tmp_path: Path, check: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"is not what the recipe promises: .*{message}"):
        get(server, tmp_path / "new", **check)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(("status", "attempts"), [("404", 1), ("403", 1), ("503", 4)])
def test_a_server_that_refuses_is_asked_again_only_where_it_may_help(
    server: FaultyServer, tmp_path: Path, status: Fault, attempts: int
) -> None:
    server.faults = lambda name, number: status
    with pytest.raises(RecipeError, match=rf"attempt {attempts} of 4\): {status}(.|\n)*--from FILE-or-FOLDER"):
        get(server, tmp_path)
    assert server.asked["a.zip"] == attempts


def test_without_a_network_the_error_describes_the_use_of_a_copy(tmp_path: Path) -> None:
    wanted = Download(url="http://127.0.0.1:1/a.zip", file="a.zip", git_blob=BLOB)
    with pytest.raises(RecipeError, match=r"ClientConnectorError(.|\n)*--from FILE-or-FOLDER"):
        fetch(wanted, tmp_path, allow_http_loopback=True, wait=lambda seconds: None)
    for url in ("http://127.0.0.1:1/a", "http://example.org/a", "file:///etc/passwd"):
        with pytest.raises(RecipeError, match="is not https"):
            fetch(wanted.model_copy(update={"url": url}), tmp_path, allow_http_loopback="example" in url)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("name: a\ntitle: b\nsynthetic: true\ndraw: {images_per_class: 1, size_px: 64, sede: 1}", "draw.sede: Extra"),
        ("title: b\nsynthetic: true", "name: Field required"),
        ("name: a\ntitle: b\nsynthetic: true", "has neither `draw` nor `download`"),
        ("name: ../a\ntitle: b\nsynthetic: true", "name: String should match"),
        (
            "name: a\ntitle: b\nsynthetic: false\ndownload: [{url: 'https://h/a', file: a, size_bytes: 1}]",
            r"download\.0: .*neither sha256 nor git_blob is given",
        ),
        ("name: a\ntitle: b\nsynthetic: false\nclasses: [x]\nbins: {y: z}", "bins are given for unknown classes: y"),
    ],
)
def test_a_wrong_recipe_names_which_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        recipes.load_recipe(tmp_path / "a.yaml")


def test_classes_may_be_called_yes_no_or_1(tmp_path: Path) -> None:
    bins = "yes: 010\nno: off\n1: 1:30\n~: null\n"
    (tmp_path / "bins.yaml").write_text(bins)
    expected = {"yes": "010", "no": "off", "1": "1:30", "~": "null"}
    assert recipes.load_pairs(tmp_path / "bins.yaml", "bin") == expected
    recipe = (
        "name: 2026\ntitle: b\nsynthetic: yes\nclasses: [yes, no, 1, ~]\ndraw: {images_per_class: 1, size_px: 99}\n"
    )
    (tmp_path / "a.yaml").write_text(f"{recipe}\nbins: {{{bins.strip().replace(chr(10), ', ')}}}")
    loaded = recipes.load_recipe(tmp_path / "a.yaml")
    assert (loaded.classes, loaded.bins, loaded.name, loaded.synthetic) == (tuple(expected), expected, "2026", True)
    for text in ("yes: a\nyes: b", "yes:", "- a"):
        (tmp_path / "bins.yaml").write_text(text)
        with pytest.raises(RecipeError, match="is not YAML with lines"):
            recipes.load_pairs(tmp_path / "bins.yaml", "bin")


def test_the_recipes_of_the_repository_are_whole() -> None:
    for path in SHARDS.glob("*.yaml"):
        recipe = recipes.load_recipe(path)
        assert recipe.name == path.stem
        names = recipe.classes or synthetic.KINDS[: recipe.draw.classes if recipe.draw else 0]
        assert set(recipe.bins) == set(names)
        for entry in recipe.download:
            assert entry.url.startswith("https://")
            assert entry.url.endswith("/" + entry.file)
        assert set(recipe.split.lists.values()) <= {entry.file for entry in recipe.download}


def test_a_drawn_set_is_made_once_and_reports_that_it_is_synthetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (SHARDS / "sample.yaml").read_text().replace("images_per_class: 120", "images_per_class: 12")
    (tmp_path / "sample.yaml").write_text(recipe.replace("size_px: 144", "size_px: 48"))
    command = ["shard", str(tmp_path / "sample.yaml")]
    assert main(command) == 0
    manifest = Manifest.load(tmp_path / "sample")
    assert manifest.classes == synthetic.KINDS
    assert manifest.recipe["synthetic"] is True
    assert sum(split.num_samples for split in manifest.splits.values()) == 72
    assert manifest.bins["bottle"] == "glass"
    capsys.readouterr()
    assert main(command) == 0
    assert "was already made from this recipe: nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--fractions", "0.5,0.25,0.25"])
    assert "finished set of other images or other options" in capsys.readouterr().err


def test_a_local_copy_may_be_a_zip_a_folder_with_a_zip_or_class_folders(trashnet_zip: Path, tmp_path: Path) -> None:
    recipe = recipes.load_recipe(SHARDS / "trashnet.yaml")
    job = recipes.plan_job(recipe, tmp_path / "out", Options())
    for local in (trashnet_zip, trashnet_zip.parent):
        found = recipes.locate_images(recipe, job, local=local, downloads=tmp_path)
        assert found.source == trashnet_zip
        assert set(found.split_files) == {"train", "val", "test"}
    for file in recipe.split.lists.values():
        (tmp_path / file).touch()
    assert recipes.locate_images(recipe, job, local=tmp_path, downloads=tmp_path).source == tmp_path
    (tmp_path / "a.zip").touch()
    (tmp_path / "b.zip").touch()
    with pytest.raises(RecipeError, match=r"holds 2 archives: a\.zip, b\.zip"):
        recipes.locate_images(recipe, job, local=tmp_path, downloads=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"holds no one-indexed-files-notrash_train\.txt"):
        recipes.locate_images(recipe, job, local=tmp_path / "empty", downloads=tmp_path)


def test_drawings_depend_on_seed_kind_and_number_alone(tmp_path: Path) -> None:
    first = synthetic.draw_image("can", 3, size_px=64, seed=0)
    assert first == synthetic.draw_image("can", 3, size_px=64, seed=0)
    others = {
        synthetic.draw_image(k, n, size_px=64, seed=s) for k, n, s in (("can", 3, 1), ("can", 4, 0), ("box", 3, 0))
    }
    assert len(others) == 3
    assert first not in others
    assert main(["draw", str(tmp_path / "new"), "--images-per-class", "2", "--size", "64", "--seed", "5"]) == 0
    assert len(list((tmp_path / "new").glob("*/*.jpg"))) == 2 * len(synthetic.KINDS)
    with pytest.raises(SystemExit):
        main(["draw", str(tmp_path / "new"), "--size", "4"])


def test_the_mean_colour_of_a_drawing_hardly_shows_its_kind() -> None:
    def mean_colour(kind: str, number: int) -> list[float]:
        image = Image.open(io.BytesIO(synthetic.draw_image(kind, number, size_px=32, seed=0)))
        return [float(channel) for channel in np.asarray(image, float).mean(axis=(0, 1))]

    colours = np.array([[mean_colour(kind, n) for n in range(30)] for kind in synthetic.KINDS])  # [kind, number, RGB]
    centres = colours[:, :20].mean(axis=1)
    distances = np.linalg.norm(colours[:, 20:, None] - centres[None, None], axis=-1)
    correct = distances.argmin(axis=-1) == np.arange(len(synthetic.KINDS))[:, None]
    assert correct.mean() < 0.4  # chance is 0.17
