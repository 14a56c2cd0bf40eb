"""What there is to read: the images of a job with their classes and, if the source or lists say so, their splits."""

from __future__ import annotations

from pathlib import Path

from wasteddp.data.manifest import LeftOut
from wasteddp.errors import SourceError
from wasteddp.sharding import scan, splits
from wasteddp.sharding.job import Job, Listing
from wasteddp.sharding.sources.archives import Source, open_source
from wasteddp.sharding.sources.layout import check_classes, read_folders, read_table


def list_images(job: Job, work: Path) -> Listing:
    """Opens the source of a job; `work` may take what has to be unpacked.

    Raises:
        SourceError: no images, classes or lists that contradict each other, too many images that a list misses.
    """
    source: Source
    if job.source.suffix.lower() == ".csv" and job.source.is_file():
        source, layout = read_table(job.source, classes=job.classes)
    else:
        source = open_source(job.source, work_folder=work)
        layout = read_folders(source, job.source, classes=job.classes)
    if layout.is_split and (job.split_files or job.options.fractions):
        raise SourceError(
            f"{job.source} is already split into {', '.join(sorted({p.split for p in layout.pictures}))}",
            "a second split would mix what somebody kept apart",
            "leave out --fractions and --split-files, or give the class folders without the split folders",
        )
    if job.split_files and job.options.fractions:
        raise SourceError(
            "both list files and fractions are given", "an image would have two splits", "leave out one of them"
        )
    if job.bins and set(job.bins) != set(layout.classes):
        raise SourceError(
            f"bins are given for {', '.join(sorted(job.bins))}; the classes are {', '.join(layout.classes)}",
            "an image could be classified and still have no bin",
            "give one bin for each class",
        )
    if layout.ignored:
        shown = ", ".join(layout.ignored[:5]) + (", ..." if len(layout.ignored) > 5 else "")
        print(f"{len(layout.ignored)} file(s) are no images in a class folder and are passed over: {shown}")
    if not job.split_files:
        return Listing(source, layout)
    layout, not_listed, missing = splits.apply_lists(layout, splits.read_list_files(job.split_files))
    check_classes({picture.class_name for picture in layout.pictures}, layout.classes, "the lists of the splits")
    absent = [LeftOut(line.name, "unreadable", f"listed in {line.place}, but not there") for line in missing]
    if len(absent) > scan.max_unusable(len(layout.pictures) + len(absent), job.options.max_left_out):
        raise scan.too_many(absent, len(layout.pictures) + len(absent), job.options.max_left_out)
    return Listing(source, layout, (*absent, *(LeftOut(path, "not_listed", "no list names it") for path in not_listed)))
