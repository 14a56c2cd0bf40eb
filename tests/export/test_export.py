"""`wasteddp export`: each file answers as the model does, from the image file on, or nothing is written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from exported_run import NUM_VAL, photos, write_exported_run
from PIL import Image
from small_run import BINS, CARD, CLASSES, random_weights

import wasteddp
from wasteddp.cli import main
from wasteddp.data.decoding.crop import evaluation_view
from wasteddp.errors import BundleError, LaunchError, SettingsError, StorageError
from wasteddp.export import runtimes, weights
from wasteddp.export.export import export_model
from wasteddp.inference.bundle import read_card, replace_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.inference.onnx_classifier import open_session


def is_missing(*packages: str) -> bool:
    return any(find_spec(package) is None for package in packages)


onnx = pytest.mark.skipif(is_missing("onnx", "onnxruntime", "onnxscript"), reason="the extra [onnx] is not installed")
openvino = pytest.mark.skipif(is_missing("openvino"), reason="the extra [openvino] is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def onnx_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    return export_model(run, to="onnx", out=out, policy=run / "policy.json")


@pytest.fixture(scope="module")
def pt2_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(run, to="torch-export", out=tmp_path_factory.mktemp("pt2"))


@pytest.fixture
def kept_onnx(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX file is not exported again, which takes 10 s."""

    def copied(_: Any, __: int, path: Path, ___: Any) -> Path:
        return Path(shutil.copyfile(onnx_file, path))

    monkeypatch.setattr(runtimes, "write_onnx", copied)


@pytest.fixture
def kept_pt2(pt2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for torch.export."""

    def copied(_: Any, __: int, path: Path, ___: Any) -> Path:
        return Path(shutil.copyfile(pt2_file, path))

    monkeypatch.setattr(runtimes, "write_torch_export", copied)


def parity(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    assert (found["pixels"]["images"], found["pixels"]["equal"]) == (NUM_VAL, NUM_VAL)
    for size in (1, 7, 8):
        batch = found["answers"][f"batch_{size}"]
        assert batch["same_class"] == batch["same_decision"] == NUM_VAL
        assert batch["largest_logit_difference"] <= found["answers"]["logit_tolerance"]
    return found


# --- weights ----------------------------------------------------------------------------------------------------------


def test_torchvision_takes_the_weights_and_the_preprocessing_makes_the_same_tensors(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a" / "b" / ".export-left" / "work").mkdir(parents=True)  # by a kill
    assert main(["export", str(run), "--to", "pytorch", "--out", str(tmp_path / "a" / "b")]) == 0
    assert "removed 1 temporary folder(s) with 0.0 MB, left by processes that were killed: .export-left" in (
        capsys.readouterr().out
    )
    path = tmp_path / "a" / "b" / "resnet18.pth"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "preprocessing.py",
        path.name,
        f"{path.name}.parity.json",
    ]
    record = parity(path.with_name(f"{path.name}.parity.json"))
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    network = torchvision.models.resnet18(num_classes=3)
    network.load_state_dict(torch.load(path, weights_only=True))
    module: dict[str, Any] = {}
    exec((path.parent / "preprocessing.py").read_text(), module)
    images = photos(run.parent)
    answers = wasteddp.load(run).predict(images)
    for image, answer in zip(images, answers, strict=True):
        with torch.inference_mode():
            logits = network.eval()(module["preprocess"](Image.open(image))[None])
        shares = (logits / module["TEMPERATURE"]).softmax(1)[0].tolist()
        assert dict(zip(module["CLASSES"], shares, strict=True)) == pytest.approx(dict(answer.probabilities), abs=1e-5)


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize(
    ("size", "kind"), [((48, 40), "JPEG"), ((1040, 1000), "JPEG"), ((301, 260), "JPEG"), ((301, 260), "PNG")]
)
def test_the_exported_preprocessing_sees_our_pixels(
    run: Path, tmp_path: Path, turn: int, size: tuple[int, int], kind: str
) -> None:
    weights.write_preprocessing(read_card(run / "model"), tmp_path)
    module: dict[str, Any] = {}
    exec((tmp_path / "preprocessing.py").read_text(), module)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    pixels = np.random.default_rng(turn).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, exif=exif)
    expected = evaluation_view(buffer.getvalue(), image_size_px=32, resize_px=36).astype(int)
    seen = module["CentreSquare"]()(Image.open(buffer)).permute(1, 2, 0).numpy()
    assert np.abs(seen - expected).max() <= weights.PIXEL_TOLERANCE


def test_the_hub_folder_is_a_model_and_is_uploaded_with_the_token(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    sent: list[Any] = []

    class Api:
        def __init__(self, token: str) -> None:
            sent.append(token)

        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
            sent.append((repo, private, exist_ok))
            return f"https://huggingface.co/{repo}"

        def upload_folder(
            self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
        ) -> None:
            sent.append((repo_id, folder_path, sorted(allow_patterns)))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = tmp_path / "hub"
    command = ["export", str(run), "--to", "hub", "--out", str(out), "--repo", "me/waste"]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(SystemExit):
        main(command)
    assert "HF_TOKEN is not set" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "notes.safetensors").write_text("mine")
    (out / "model-of-mine.safetensors").write_text("mine")
    (run / "model" / "README.md").write_text("---\nlibrary_name: wasteddp\n---\nmeasured")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert main(command) == 0
    (run / "model" / "README.md").unlink()
    names = sorted(file.name for file in out.iterdir() if file.read_bytes() != b"mine")
    assert sent == ["secret", ("me/waste", True, True), ("me/waste", str(out), names)]
    assert (out / "notes.safetensors").read_text() == (out / "model-of-mine.safetensors").read_text() == "mine"
    assert (out / "README.md").read_text().endswith("measured")
    assert "secret" not in capsys.readouterr().out
    config = json.loads((out / "config.json").read_bytes())
    assert config["id2label"] == {"0": "glass", "1": "metal", "2": "paper"}
    parity(out / "parity.json")
    images = photos(run.parent)
    assert wasteddp.load(out).predict(images) == wasteddp.load(run).predict(images)

    def refuse(self: Any, **how: Any) -> None:
        raise ConnectionError("403 for secret\nmore")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(LaunchError, match=r"refused the upload to me/waste: 403 for \*\*\*"):
        weights.upload(out, "me/waste", read_card(out))


def test_a_hub_folder_replaces_no_run_and_no_other_model(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_bundle(other / "model", CARD, random_weights(9))
    (other / "settings.yaml").touch()
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    for out, message in ((other / "model", "holds another model, with the weights"), (other, "is the folder of a run")):
        with pytest.raises(SettingsError, match=message):
            export_model(run, to="hub", out=out)
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}


def test_a_record_never_stands_beside_other_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "link"
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk")
    export_model(run, to="pytorch", out=out)
    record = parity(out / "resnet18.pth.parity.json")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    assert record["files"] == {name: one for name, one in hashes.items() if not name.endswith("parity.json")}
    assert record["files"].keys() == {"resnet18.pth", "preprocessing.py"}
    for number in range(1, 4):  # a kill before each file gets its name
        export_model(run, to="pytorch", out=out)
        left = number

        def replace_or_end(self: Path, target: Path) -> Path:
            nonlocal left
            left -= target.parent == out
            if not left:
                raise KeyboardInterrupt
            assert not (out / "resnet18.pth.parity.json").exists() or target.parent != out
            os.replace(self, target)  # noqa: PTH105, the method is replaced
            return target

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace_or_end)
            with pytest.raises(KeyboardInterrupt):
                export_model(run, to="pytorch", out=out)
        assert sorted(path.name for path in out.iterdir()) == ["preprocessing.py", "resnet18.pth"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a folder is needed"):
        export_model(run, to="pytorch", out=tmp_path / "file")


def test_missing_features_are_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    card = read_card(run / "model")
    replace_card(tmp_path / "run" / "model", replace(card, hashes=replace(card.hashes, features="f" * 64)))
    with pytest.raises(BundleError, match=r"features-ffffffffffff.safetensors cannot be used"):
        export_model(tmp_path / "run", to="hub", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_folder_without_a_card_gets_a_plain_one(run: Path, tmp_path: Path) -> None:
    export_model(run / "model", to="hub", out=tmp_path / "hub")  # of the bundle's folder; the set is that of its run
    assert "pipeline_tag: image-classification" in (tmp_path / "hub" / "README.md").read_text()


# --- runtimes ---------------------------------------------------------------------------------------------------------


@onnx
def test_an_onnx_file_has_all_that_another_program_needs(run: Path, onnx_file: Path) -> None:
    import onnxruntime

    record = parity(onnx_file.with_name("model.onnx.parity.json"))
    assert record["answers"]["decision"] == "policy"
    session = onnxruntime.InferenceSession(str(onnx_file))
    (images,) = session.get_inputs()
    assert (images.type, images.shape) == ("tensor(uint8)", ["batch", 32, 32, 3])
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["classes"]) == list(CLASSES)
    assert json.loads(found["bins"]) == BINS
    assert json.loads(found["thresholds"]) == {"person_below": 0.6}
    assert json.loads(found["temperature"]) == 1.7
    assert json.loads(found["hashes"])["weights"] == read_card(run / "model").hashes.weights


@onnx
def test_an_onnx_file_predicts_as_the_model_does(run: Path, onnx_file: Path, tmp_path: Path) -> None:
    images = photos(run.parent)
    policy = str(run / "policy.json")
    assert main(["predict", str(run), *map(str, images), "--csv", str(tmp_path / "a.csv"), "--policy", policy]) == 0
    assert main(["predict", str(onnx_file), *map(str, images), "--csv", str(tmp_path / "b.csv")]) == 0
    assert (
        main(["predict", str(onnx_file), *map(str, images), "--csv", str(tmp_path / "c.csv"), "--policy", policy]) == 0
    )
    ours, theirs, again = (
        [*csv.DictReader((tmp_path / name).read_text().splitlines())] for name in ("a.csv", "b.csv", "c.csv")
    )
    assert len({row["decision"] for row in ours}) == 3
    assert theirs == again
    for own, other in zip(ours, theirs, strict=True):
        assert [own[name] for name in ("path", "class", "bin", "decision", "why")] == [
            other[name] for name in ("path", "class", "bin", "decision", "why")
        ]
        assert float(own["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)
    model = wasteddp.load(onnx_file)
    assert [answer.decision for answer in model.predict(images)] == [row["decision"] for row in ours]
    np.testing.assert_allclose(model.features(images), wasteddp.load(run).features(images), rtol=1e-4, atol=1e-5)
    plain = wasteddp.load(run, tta="flips").predict(images)
    for one, other in zip(wasteddp.load(onnx_file, tta="flips").predict(images), plain, strict=True):
        assert dict(one.probabilities) == pytest.approx(dict(other.probabilities), abs=1e-5)


@onnx
def test_predict_with_an_onnx_file_does_not_import_torch(run: Path, onnx_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from wasteddp.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'torchvision', 'onnx', 'pydantic')))"
    )
    command = [sys.executable, "-c", code, "predict", str(onnx_file), str(run.parent / "images" / "val")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{NUM_VAL} classified" in done.stdout
    out = tmp_path / "watched.csv"
    watch = [*command[:-1], "--watch", command[-1], "--csv", str(out), "--every", "0.1"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") > NUM_VAL):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert f"{NUM_VAL} classified" in process.communicate()[0]
    assert process.returncode == 0
    assert len({row["decision"] for row in csv.DictReader(out.read_text().splitlines())}) == 3


@onnx
def test_a_file_that_is_not_ours_or_damaged_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    import onnx as format_

    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:5000])
    other = format_.load(str(onnx_file))
    del other.metadata_props[:]
    format_.save(other, str(tmp_path / "other.onnx"))
    for name, message in (("cut", "cannot be loaded"), ("other", "no wasteddp.card"), ("absent", "there is no file")):
        with pytest.raises(BundleError, match=message):
            wasteddp.load(tmp_path / f"{name}.onnx")
    with pytest.raises(LaunchError, match="the device 'mps' cannot be used"):
        wasteddp.load(onnx_file, device="mps")
    for file in onnx_file.parent.iterdir():
        shutil.copy(file, tmp_path)
    damaged = bytearray(onnx_file.read_bytes())
    damaged[len(damaged) // 2] ^= 64  # of a weight: onnxruntime does not notice
    (tmp_path / "model.onnx").write_bytes(damaged)
    with pytest.raises(BundleError, match=r"has the sha256 .* and model.onnx.parity.json says"):
        wasteddp.load(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.parity.json").write_text("[]")
    with pytest.raises(BundleError, match=r"says nothing that can be read"):
        wasteddp.load(tmp_path / "model.onnx")


def _edited(content: dict[str, Any], **changes: Any) -> dict[str, str]:
    """Return the metadata with another card, whose hash is right."""
    card = json.loads(content["wasteddp.card"]) | changes
    del card["sha256"]
    card["sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    return content | {"wasteddp.card": json.dumps(card)}


@onnx
def test_metadata_of_another_model_or_version_is_refused(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx as format_

    model = format_.load(str(onnx_file))
    content = {entry.key: entry.value for entry in model.metadata_props}
    size = json.loads(content["wasteddp.card"])["preprocessing"]
    policy = json.loads(content["wasteddp.policy"])
    hashes = json.loads(content["wasteddp.card"])["hashes"]

    def load(metadata: dict[str, str]) -> wasteddp.Model:
        runtimes.set_metadata(model, metadata)
        format_.save(model, str(tmp_path / "model.onnx"))
        return wasteddp.load(tmp_path / "model.onnx")

    for metadata, message in (
        (_edited(content, format_version=99), "has format version 99"),
        (_edited(content, classes=["a", "b"]), "it has another model's card"),
        (_edited(content, preprocessing=size | {"image_size_px": 16}), "16x16 px and 3 classes"),
        (content | {"wasteddp.card": "[" * 100_000}, "is not a model's card"),
        (content | {"wasteddp.policy": json.dumps(policy | {"classes": ["x", "y", "z"]})}, "other classes than"),
        (content | {"wasteddp.policy": "{}"}, "policy in its metadata that cannot be read"),
    ):
        with pytest.raises(BundleError, match=message):
            load(metadata)
    load(_edited(content, hashes=hashes | {"features": "f" * 64}))
    assert "features-ffffffffffff.safetensors is missing" in capsys.readouterr().err


@onnx
def test_threads_of_each_level_or_nonsense_in_the_environment_is_no_error(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, threads in (("2,1", 2), (" 3 ", 3), ("1", 1), ("-3", 7), ("all", 7), ("0", 7), ("", 7)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        monkeypatch.setattr("wasteddp.inference.onnx_classifier.num_usable_cores", lambda: 7)
        options = Mock()
        monkeypatch.setattr("onnxruntime.SessionOptions", lambda options=options: options)
        monkeypatch.setattr("onnxruntime.InferenceSession", Mock())
        open_session(onnx_file)
        assert options.intra_op_num_threads == threads


@onnx
@pytest.mark.usefixtures("kept_onnx")
def test_int8_reports_what_it_costs_and_refuses_the_policy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = run.parent / "shards"
    assert main(["export", str(run), "--to", "onnx", "--int8", str(shards), "--out", str(tmp_path / "q")]) == 0
    path = tmp_path / "q" / "model.int8.onnx"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.parity.json"]
    record = parity(path.with_name(f"{path.name}.parity.json"))["int8"]
    assert (record["images"], record["measured_on"]) == (NUM_VAL, "val")
    assert record["calibrated_on"] == {"split": "train", "images": 12}
    assert "int8 on 12 images of val: accuracy" in capsys.readouterr().out
    images = photos(run.parent)
    before, after = (wasteddp.load(model).predict(images) for model in (run, path))
    changed = sum(one.class_name != other.class_name for one, other in zip(before, after, strict=True))
    assert record["changed_classes"][0] == pytest.approx(changed / NUM_VAL)
    right = sum(answer.class_name == image.parent.name for answer, image in zip(after, images, strict=True))
    assert record["accuracy_after"][0] == pytest.approx(right / NUM_VAL)
    assert before != after
    with pytest.raises(wasteddp.WastedError, match="made for another model: weights"):
        wasteddp.load(path, policy=run / "policy.json")


def test_a_torch_export_file_answers_as_the_model(run: Path, pt2_file: Path) -> None:
    assert parity(pt2_file.with_name("model.pt2.parity.json"))["answers"]["decision"] == "bin"
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    loaded = torch.export.load(pt2_file)
    shares = loaded.module()(torch.from_numpy(images))[0].numpy()
    assert np.abs(shares - Classifier.load(run).probabilities(list(images))).max() < 1e-5
    extra = {"wasteddp.json": ""}
    torch.export.load(pt2_file, extra_files=extra)
    assert json.loads(json.loads(extra["wasteddp.json"])["classes"]) == list(CLASSES)


@onnx
@openvino
@pytest.mark.usefixtures("kept_onnx")
def test_an_openvino_file_answers_as_the_model(run: Path, tmp_path: Path) -> None:
    path = export_model(run, to="openvino", out=tmp_path / "openvino")
    parity(path.with_name("model.xml.parity.json"))
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["model.bin", "model.xml", "model.xml.parity.json"]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kept_pt2")
@pytest.mark.parametrize("wrong", ["logits", "class", "nan", "batch"])
def test_an_export_that_answers_otherwise_is_named_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    load = runtimes.run_torch_export

    def loaded(path: Path) -> Any:
        answer = load(path)

        def run(images: Any) -> Any:
            shares, logits = (found.copy() for found in answer(images))
            if wrong == "logits" or (wrong == "batch" and len(images) == 7):
                logits += 0.1
            elif wrong == "class":
                shares = shares[:, ::-1]
            elif wrong == "nan":
                logits[0] = np.nan
            return shares, logits

        return run

    monkeypatch.setattr(runtimes, "run_torch_export", loaded)
    message = r"val/.*\.jpg, batches of " + {"batch": "7: logits", "class": ".*another class"}.get(wrong, "1: logits")
    with pytest.raises(BundleError, match=message):
        export_model(run, to="torch-export", out=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kept_pt2")
def test_an_export_that_sees_other_pixels_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wasteddp.data.decoding import centre

    resize = centre.resize
    monkeypatch.setattr(centre, "resize", lambda pixels, side: resize(pixels, side) ^ 2)
    (tmp_path / "model.pt2").write_text("an earlier one")
    with pytest.raises(BundleError, match="pixels differ by 2 of 255"):
        export_model(run, to="torch-export", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "an earlier one"


@pytest.mark.parametrize(
    ("package", "to", "extra"), [("onnxscript", "onnx", "onnx"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_extra_is_named_with_its_install_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, to: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        runtimes, "write_onnx", runtimes.write_onnx if to == "onnx" else lambda *_: _touch(tmp_path / "x.onnx")
    )
    with pytest.raises(LaunchError, match=rf"pip install 'wasteddp\[{extra}\]'"):
        export_model(run, to=to, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "pytorch", "--int8", "x"], "--int8 is given, and --to is pytorch"),
        (["--to", "onnx", "--repo", "x/y"], "--repo is given, and --to is onnx"),
        (["--to", "pytorch", "--split", "absent"], "no samples in a split called 'absent'"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
