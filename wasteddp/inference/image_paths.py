"""What a user names on the command line -> image files, lazily: a folder may hold millions.

Of folders and globs the files with an image's suffix are taken; a file that is named itself is taken whatever it is.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from wasteddp.errors import SourceError
from wasteddp.sharding.sources.layout import IMAGE_SUFFIXES, is_image


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """The images named by files, folders (with all folders below) and globs (`**` too), sorted within each.

    Every path is looked at before the first image is given out, so a misspelt one is refused at once. Beyond that only
    the names in one folder at a time are held. A folder that cannot be listed is given out itself, for its reader to
    say why not.

    Raises:
        SourceError: a path or glob under which there is nothing.
    """
    return chain.from_iterable([_at_least_one(path) for path in paths])


def _at_least_one(path: str) -> Iterator[str]:
    if Path(path).is_dir():
        images = _below(path)
    elif Path(path).exists():  # before globs: a file may be called photo[1].jpg
        images = iter([path])
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, Path.glob takes no absolute pattern
        images = (match for match in found if _is_image(match))
    else:
        raise SourceError(f"there is no {path}", "there is nothing to classify", "check the path")
    first = next(images, None)
    if first is None:
        raise SourceError(
            f"there is no image {'in' if Path(path).is_dir() else 'that matches'} {path}",
            "there is nothing to classify",
            f"check the path; of folders and globs the files called {' '.join(sorted(IMAGE_SUFFIXES))} are taken",
        )
    return chain([first], images)


def _below(folder: str) -> Iterator[str]:
    """Images in a folder, then in its folders; hidden ones are skipped (`._photo.jpg` is what macOS adds to zips)."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError:
        yield folder
        return
    yield from (entry.path for entry in listed if _is_image(entry.path))
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):  # a link to a folder above would never end
            yield from _below(entry.path)


def _is_image(path: str) -> bool:
    # not a pipe or a device, which may never end; a dangling link is given out, for its reader to say so
    return is_image(path) and (Path(path).is_file() or not Path(path).exists())
