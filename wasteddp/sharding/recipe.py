"""A recipe: one YAML file that describes where a data set comes from, its licence, and how it becomes a shard set.

Its downloads are https only, resumed after a broken connection, and checked by size and hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from wasteddp.data.manifest import WORK_NAME, Manifest
from wasteddp.data.remote.folder import Patience, RemoteFolder
from wasteddp.errors import DamagedShardError, RecipeError, RemoteError, joined, storage
from wasteddp.files import open_regular, read_text, sha256_of
from wasteddp.settings import describe_problems, plain_yaml
from wasteddp.sharding.build import Job, Options, find_finished, make_shards
from wasteddp.sharding.corrections import Corrections
from wasteddp.sharding.sources import synthetic as drawing

_Bin = Annotated[str, Field(min_length=1)]
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PATIENCE = Patience(attempts=4)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_BRING_IT = (
    "run it again where there is a network (it goes on where it stopped), or bring the file from another machine and "
    "name it or its folder: wasteddp shard RECIPE --from FILE-or-FOLDER"
)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Strict):
    homepage: str
    authors: tuple[str, ...]
    year: int
    licence: str


class Draw(_Strict):
    classes: int = Field(default=len(drawing.KINDS), ge=2, le=len(drawing.KINDS))
    images_per_class: int = Field(ge=1, le=100_000)
    size_px: int = Field(ge=32, le=2048)
    seed: int = Field(default=0, ge=0)


class Download(_Strict):
    """A file to download. `git_blob` is the id that git gives the content: sha1 of "blob SIZE\\0" and the bytes."""

    url: str
    file: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    git_blob: str = Field(default="", pattern=r"^([0-9a-f]{40})?$")
    size_bytes: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _needs_proof(self) -> Download:
        if not self.sha256 and not self.git_blob:
            raise ValueError("neither sha256 nor git_blob is given, so other bytes would not be noticed")
        return self


class SplitRule(_Strict):
    """Either `lists` (split -> list file) or `fractions` by a `rule`. Recipes that name no rule keep the older one."""

    lists: Mapping[str, str] = Field(default_factory=dict)
    fractions: tuple[float, float, float] | None = None
    rule: Literal["hash", "stratified"] = "hash"


class Recipe(_Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    synthetic: bool
    source: Origin | None = None
    citation: str = ""
    classes: tuple[str, ...] = ()
    bins: Mapping[str, str] = Field(default_factory=dict)
    split: SplitRule = SplitRule()
    download: tuple[Download, ...] = ()
    draw: Draw | None = None


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: the file is not YAML, or keys are unknown, missing or have wrong values. The message names each.
    """
    text = read_text(path, "reading the recipe")
    try:
        tree = plain_yaml(text, as_text=True)  # a class may be called yes, no or 1
        if isinstance(tree, dict):
            tree = {key: value for key, value in tree.items() if value != ""}
        recipe = Recipe.model_validate(tree)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}", "no set can be made from it", "fix the named line") from error
    except ValidationError as error:
        raise RecipeError(
            f"{path} is not a recipe: {describe_problems(error)}",
            "the set would not be the one that the recipe describes",
            f"fix these keys; known keys: {', '.join(Recipe.model_fields)}",
        ) from error
    if recipe.classes and recipe.bins.keys() - set(recipe.classes):
        unknown = sorted(recipe.bins.keys() - set(recipe.classes))
        raise RecipeError(
            f"{path}: bins are given for unknown classes: {joined(unknown)}",
            "a class would have no bin",
            "use the same names in `classes` and `bins`",
        )
    if bool(recipe.draw) == bool(recipe.download):
        raise RecipeError(
            f"{path} has {'both `draw` and' if recipe.draw else 'neither `draw` nor'} `download`",
            "it is not clear where the images come from",
            "give exactly one of them",
        )
    return recipe


def load_pairs(path: Path, value: str) -> dict[str, str]:
    """Read a YAML file with lines such as `class: bin`; `value` is the second word, for messages."""
    text = read_text(path, f"reading the {value}s of classes")
    try:
        pairs = TypeAdapter(dict[str, _Bin]).validate_python(plain_yaml(text, as_text=True))
    except (yaml.YAMLError, ValidationError) as error:
        wrong = describe_problems(error) if isinstance(error, ValidationError) else error
        raise RecipeError(
            f"{path} is not YAML with lines `class: {value}`: {wrong}",
            f"the {value}s of the classes are not known",
            f"write one line `class: {value}` for each class",
        ) from error
    stripped = {name.strip(): of.strip() for name, of in pairs.items()}  # as the names of class folders
    if len(stripped) < len(pairs) or not all(stripped.values()):
        raise RecipeError(
            f"{path}: two lines are for one class, apart from spaces at the ends, or a {value} has only spaces",
            f"the {value} of a class would not be known",
            f"write one line `class: {value}` for each class",
        )
    return stripped


def make_recipe(
    path: Path,
    *,
    out: Path | None,
    local: Path | None,
    options: Options,
    workers: int,
    overwrite: bool,
    corrections: Corrections | None = None,
) -> Manifest:
    """Create the set of a recipe. `out` is by default a folder next to the recipe; `local` is a copy of its images."""
    recipe = load_recipe(path)
    job = replace(plan_job(recipe, out or path.parent / recipe.name, options), corrections=corrections)
    if recipe.draw is None:
        job = locate_images(recipe, job, local=local, downloads=path.parent / "downloads" / recipe.name)
    elif not overwrite and (finished := find_finished(job)):
        print(f"{job.out} was already made from this recipe: nothing to do")
        return finished
    else:
        job = draw_images(recipe.draw, job)
    return make_shards(job, workers=workers, overwrite=overwrite)


def local_job(
    path: Path, *, out: Path | None, local: Path | None, options: Options, corrections: Corrections | None = None
) -> Job:
    """Return the job of a recipe whose images are on this machine.

    Raises:
        RecipeError: the recipe draws its images, or `local` is not given: each part would draw or download all of them.
    """
    recipe = load_recipe(path)
    if recipe.draw is not None or local is None:
        raise RecipeError(
            f"{path} {'draws' if recipe.draw else 'downloads'} its images",
            f"each part would {'draw' if recipe.draw else 'download'} all of them",
            "give a local copy with --from" if recipe.download else "run it on one machine, without --part",
        )
    job = replace(plan_job(recipe, out or path.parent / recipe.name, options), corrections=corrections)
    return locate_images(recipe, job, local=local, downloads=local)


def plan_job(recipe: Recipe, out: Path, options: Options) -> Job:
    """Return the job of a recipe, still without its images. `options` have precedence over the recipe."""
    if options.fractions is None and recipe.split.fractions is not None:
        options = replace(options, fractions=recipe.split.fractions)
    if not recipe.split.lists:
        options = replace(options, split_rule=options.split_rule or recipe.split.rule)
    if recipe.draw:
        options = options.settled(is_split=False)
    described = recipe.model_dump(mode="json", exclude={"name", "classes", "bins"}, exclude_defaults=True)
    return Job(source=out, out=out, options=options, classes=recipe.classes, bins=recipe.bins, recipe=described)


def draw_images(draw: Draw, job: Job) -> Job:
    """Draw the images of a recipe into the hidden folder of the set, where they are kept until the set is finished."""
    folder = job.out / WORK_NAME / "drawn"
    kinds = drawing.KINDS[: draw.classes]
    drawing.draw_folder(
        folder, kinds=kinds, images_per_class=draw.images_per_class, size_px=draw.size_px, seed=draw.seed
    )
    return replace(job, source=folder)


def locate_images(recipe: Recipe, job: Job, *, local: Path | None, downloads: Path) -> Job:
    """Find the images and lists of a recipe in the local copy, or download them to `downloads`."""
    if local is None:
        paths = [fetch(entry, downloads) for entry in recipe.download]
        images = next(path for path in paths if path.name.endswith(_ARCHIVES))
        folder = downloads
    else:
        images, folder = _local_copy(local, [entry.file for entry in recipe.download])
    lists = {split: _list_file(folder, file) for split, file in recipe.split.lists.items()}
    return replace(job, source=images, split_files=lists)


def fetch(
    wanted: Download,
    folder: Path,
    *,
    allow_http_loopback: bool = False,
    wait: Callable[[float], None] | None = None,
) -> Path:
    """Download the file into `folder`, unless it is there with the right hash, and return its path.

    Raises:
        RecipeError: the URL is not https, all attempts failed, or the bytes are not those that the recipe promises.
    """
    parts = urlsplit(wanted.url)
    if parts.scheme != "https" and not (allow_http_loopback and parts.hostname in _LOOPBACK):
        raise RecipeError(f"{wanted.url} is not https", "anybody on the way could change it", "give an https address")
    path = folder / wanted.file
    part = path.with_name(path.name + ".part")
    with storage("making the download folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _difference(wanted, path):
        return path
    above, _, name = parts.path.rpartition("/")
    remote = RemoteFolder(urlunsplit(parts._replace(path=above)), _PATIENCE, wait=wait)
    try:
        with storage("writing the download", part), os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT), "r+b") as file:
            file.seek(0, os.SEEK_END)
            remote.fetch(unquote(name), file, wanted.size_bytes)
        difference = _difference(wanted, part)
    except RemoteError as error:
        raise RecipeError(error.found, "the images of this recipe are not here", _BRING_IT) from error
    except DamagedShardError as error:
        difference = error.found
    finally:
        remote.close()
    if difference:
        part.unlink()  # the next start would append to the wrong bytes
        raise RecipeError(
            f"{wanted.url} is not what the recipe promises: {difference}",
            "the set would not be the one that the recipe describes",
            f"if it stays so, the file was removed or replaced; {_BRING_IT}",
        )
    with storage("keeping the download", path):
        part.replace(path)
    return path


def _local_copy(local: Path, names: Sequence[str]) -> tuple[Path, Path]:
    """Return the images (an archive or a folder) and the folder of the list files."""
    if local.is_file():
        return local, local.parent
    if not local.is_dir():
        raise RecipeError(
            f"there is no {local}", "there are no images to shard", "give the file or folder of a local copy"
        )
    with storage("looking for the images", local):
        archives = sorted(path for path in local.iterdir() if path.name.endswith(_ARCHIVES))
    named = [path for path in archives if path.name in names] or archives
    if len(named) > 1:
        raise RecipeError(
            f"{local} holds {len(named)} archives: {', '.join(path.name for path in named)}",
            "it is not clear which one holds the images",
            "name the file: --from FILE",
        )
    return (named[0] if named else local), local


def _list_file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise RecipeError(
            f"{folder} holds no {name}",
            "the split of the recipe is not known",
            "put the list files of the data set next to the images",
        )
    return folder / name


def _difference(wanted: Download, path: Path) -> str:
    """Return how a file differs from what is wanted; empty if it does not."""
    size = path.stat().st_size
    if wanted.size_bytes not in (None, size):
        return f"{size:,} bytes instead of {wanted.size_bytes:,}"
    with open_regular(path) as file:
        blob = partial(hashlib.sha1, b"blob %d\0" % size, usedforsecurity=False)
        found = {"sha256": sha256_of(path), "git_blob": hashlib.file_digest(file, blob).hexdigest()}
    wrong = [
        f"{name} {digest} instead of {promised} ({size:,} bytes)"
        for name, digest in found.items()
        if (promised := getattr(wanted, name)) not in ("", digest)
    ]
    return ", ".join(wrong)
