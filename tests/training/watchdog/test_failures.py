"""The messages of failures, and which ranks the others wait for."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from wasteddp.errors import DamagedSampleError, DeviceMemoryError, SettingsError, StorageError
from wasteddp.settings import Settings, parse
from wasteddp.training.watchdog.failures import (
    Beat,
    comes_from_a_peer,
    describe_blocking_ranks,
    describe_standstill,
    explain,
    failure_message,
)


def beat(count: int, marks: int, place: str = "computing", *, left: bool = False, detail: str = "") -> Beat:
    return Beat(count, marks, step=7, place=place, quiet_s=12.3, detail=detail, left=left)


def test_a_rank_that_beats_no_more_is_the_silent_one() -> None:
    said = describe_blocking_ranks([beat(5, 90), beat(5, 88), None], [beat(8, 90), beat(5, 88), None])
    assert said.startswith("ranks 1, 2 of 3 do not respond any more")
    assert "rank 1: step 7, computing for 12 s" in said
    assert "rank 2: never connected" in said


def test_a_rank_that_left_in_peace_is_not_silent() -> None:
    gone = beat(5, 99, left=True)
    assert "not respond" not in describe_blocking_ranks([gone, beat(3, 90)], [gone, beat(6, 90)])


def test_the_others_wait_for_the_loop_that_came_least_far() -> None:
    before = [beat(5, 91, "waiting for the other ranks"), beat(5, 90, "waiting for data"), beat(5, 91)]
    stuck = beat(8, 90, "waiting for data", detail="decode_2 has been at train-000001.tar, sample 3 for 12 s")
    said = describe_blocking_ranks(before, [beat(8, 91, "waiting for the other ranks"), stuck, beat(8, 91)])
    assert said.startswith("the others wait for rank 1 of 3")
    assert f"rank 1: step 7, waiting for data for 12 s ({stuck.detail})" in said
    assert said.index("rank 1:") < said.index("rank 0:")


def test_ranks_at_the_same_place_are_named_together() -> None:
    assert describe_blocking_ranks([beat(1, 9), beat(1, 9)], [beat(4, 9), beat(4, 9)]).startswith("all 2 ranks hang")
    assert describe_blocking_ranks([beat(1, 9), beat(1, 8)], [beat(4, 9), beat(4, 8)], only_silent=True) == ""
    assert describe_blocking_ranks([], []) == ""


def test_of_a_thousand_ranks_a_few_are_named() -> None:
    before = [beat(1, 9)] * 1000
    after = [beat(1 if rank % 2 else 4, 9) for rank in range(1000)]
    said = describe_blocking_ranks(before, after)
    assert said.startswith("ranks 1, 3, 5, 7, 9, 11, 13, 15 and 492 more of 1000 do not respond")
    assert len(said.splitlines()) < 20


def test_out_of_gpu_memory_names_what_to_set() -> None:
    settings = parse("train: {max_micro_batch: 96}\nevaluate: {batch_size: 256}")
    raised = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    error = explain(raised, settings, "computing")
    assert isinstance(error, DeviceMemoryError)
    assert "with train.max_micro_batch 96 at 224 px: CUDA out of memory. Tried to allocate 2.00 GiB." in error.found
    assert "set train.max_micro_batch to 48 or less (the global batch stays the same" in error.remedy
    assert "set evaluate.batch_size to 128 or less" in str(explain(raised, settings, "evaluating"))
    larger = parse("data: {eval_size: 288}\nevaluate: {batch_size: 1}")
    assert "with evaluate.batch_size 1 at 288 px" in str(explain(raised, larger, "evaluating"))
    assert "lower data.eval_size" in str(explain(raised, larger, "evaluating"))
    assert "at 224 px" in str(explain(raised, larger, "computing"))
    one = parse("train: {max_micro_batch: 1}")
    assert "lower data.image_size" in str(explain(raised, one, "computing"))


def test_other_errors_stay_themselves() -> None:
    error = ValueError("odd")
    assert explain(error, parse(""), "computing") is error


def test_a_broken_collective_is_laid_to_a_peer_and_a_bug_is_not() -> None:
    assert comes_from_a_peer(RuntimeError("[/pytorch/third_party/gloo/...] Connection closed by peer [127.0.0.1]:5"))
    assert comes_from_a_peer(torch.distributed.DistBackendError("NCCL error"))
    assert not comes_from_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not comes_from_a_peer(ConnectionResetError("reset by peer"))


def test_a_bug_is_reported_with_its_place_and_notes() -> None:
    error = MemoryError("no room")
    error.add_note("in the loader's thread decode_3, at train-000000.tar, sample 2 at byte 512")
    said = failure_message(error, "rank 1, step 3, waiting for data")
    assert said.startswith("rank 1, step 3, waiting for data: MemoryError: no room")
    assert "in the loader's thread decode_3, at train-000000.tar, sample 2" in said
    mistake = DamagedSampleError("found", "so", "do")
    assert failure_message(mistake, "").endswith("do: do")
    assert failure_message(mistake, "rank 0, step 4, computing").endswith("do: do\n  at: rank 0, step 4, computing")
    mistake.add_note("rank 3, step 4, waiting for data")
    assert failure_message(mistake, "rank 0, step 4, computing").endswith("at: rank 3, step 4, waiting for data")


def test_a_rank_alone_names_where_it_stands_still() -> None:
    said = describe_standstill(
        0, beat(9, 9, "evaluating", detail="decode_0 has been at val-000000.tar, sample 1 for 12 s")
    )
    assert said.startswith("no progress: rank 0: step 7, evaluating for 12 s (decode_0 has been at val-000000.tar")
    assert "raise run.timeout_s" in said


def test_one_image_of_one_pixel_in_the_last_stage_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    found = explain(caught.value, parse("", ["data.image_size=32"]), "computing")
    assert isinstance(found, SettingsError)
    assert "raise train.batch_size or train.max_micro_batch" in str(found)


def test_an_error_of_a_file_is_the_users_and_one_of_a_connection_is_not() -> None:
    place = "computing"
    known = explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Settings(), place)
    assert isinstance(known, StorageError)
    assert "the training, while computing: No space left on device" in str(known)
    assert "do: free some space" in str(known)
    lost = ConnectionResetError(errno.ECONNRESET, "reset")
    assert explain(lost, Settings(), place) is lost
