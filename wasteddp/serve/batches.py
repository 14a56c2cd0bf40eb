"""Images of many requests, computed together: threads decode, and one thread computes batches.

An image waits at most `wait_s` for others. The number of images that were taken and not answered is limited.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from wasteddp.data.decoding.decode import ImageHWC, UndecodableError, header
from wasteddp.data.decoding.formats import is_jpeg
from wasteddp.decisions.decide import Policy
from wasteddp.inference.any_classifier import AnyClassifier
from wasteddp.inference.prediction_files import Answer, decisions_of
from wasteddp.parallel import num_usable_cores


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes on.

    Attributes:
        request_bytes: of a request's body.
        held_bytes: of all bodies together.
        pixels: of one image, and of all that are decoded at the same time; a JPEG counts as a quarter of its own.
        images: that were taken and not answered, of all requests.
        request_s: from the end of a request's headers to its answer.
        header_s: from the start of a connection, or the end of an answer, to the end of the next request's headers.
        connections: at the same time.
        wait_s: that an image waits for others in its batch.
    """

    request_bytes: int = 32 << 20
    held_bytes: int = 256 << 20
    pixels: int = 100_000_000
    images: int = 128
    request_s: float = 30.0
    header_s: float = 10.0
    connections: int = 512
    wait_s: float = 0.004


class BusyError(Exception):
    """There are too many images or bytes already."""


Waiting = tuple[str, ImageHWC, "Future[Answer]"]


class Batches:
    """Answers images in batches. `close` answers those that were taken."""

    def __init__(self, classifier: AnyClassifier, limits: Limits, *, policy: Policy | None = None) -> None:
        self._classifier, self._limits, self._policy = classifier, limits, policy
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._turn, self._room = threading.Lock(), threading.Condition()  # to begin decoding; for its pixels
        self._num_pixels = 0  # of the images that are being decoded
        self.num_taken, self.num_batches = 0, 0
        self._decoders = ThreadPoolExecutor(num_usable_cores(), "decode")
        self._thread = threading.Thread(target=self._compute, name="compute", daemon=True)
        self._thread.start()

    def take(self, images: list[tuple[str, bytes]]) -> list[Future[Answer]]:
        """Take (name, bytes of a file) of each image, and return a future for each; all or none are taken.

        A future has an `UndecodableError` if its bytes are no image or have too many pixels. One that is cancelled is
        not computed.

        Raises:
            BusyError: too many images wait.
        """
        with self._lock:
            if self.num_taken + len(images) > self._limits.images:
                raise BusyError(f"{self.num_taken} images wait; the limit is {self._limits.images}")
            self.num_taken += len(images)
        futures = list[Future[Answer]]()
        for name, data in images:
            future = Future[Answer]()
            future.add_done_callback(self._count_done)
            futures.append(future)
            self._decoders.submit(self._decode, name, data, future)
        return futures

    def close(self) -> None:
        """Answer what was taken, and end the threads."""
        self._decoders.shutdown()
        self._queue.put(None)
        self._thread.join()

    def _count_done(self, future: Future[Answer]) -> None:
        with self._lock:
            self.num_taken -= 1

    def _decode(self, name: str, data: bytes, future: Future[Answer]) -> None:
        if future.cancelled():
            return
        try:
            height, width, _ = header(data)
            if height * width > self._limits.pixels:
                raise UndecodableError(
                    "too_large", f"{width}x{height} px; the limit of this server is {self._limits.pixels:,} pixels"
                )
            with self._decoding(height * width // 4 if is_jpeg(data) else height * width):
                view = self._classifier.view(data)
            self._queue.put((name, view, future))
        except Exception as error:  # of any kind: the request must have an answer
            with suppress(Exception):  # it was cancelled
                future.set_exception(error)

    @contextmanager
    def _decoding(self, num_pixels: int) -> Iterator[None]:
        """Wait for room. A PNG of 100 million pixels may have 300 kB, and takes 1.5 GB while it is decoded."""
        with self._turn, self._room:  # in turn, or a large image would wait as long as small ones come
            self._room.wait_for(lambda: not self._num_pixels or self._num_pixels + num_pixels <= self._limits.pixels)
            self._num_pixels += num_pixels
        try:
            yield
        finally:
            with self._room:
                self._num_pixels -= num_pixels
                self._room.notify_all()

    def _compute(self) -> None:
        while batch := self._next_batch():
            there = [one for one in batch if one[2].set_running_or_notify_cancel()]
            if not there:
                continue
            try:
                answers = self._answers(there)
            except Exception as error:
                for _, _, future in there:
                    future.set_exception(error)
                continue
            for answer, (_, _, future) in zip(answers, there, strict=True):
                future.set_result(answer)

    def _next_batch(self) -> list[Waiting]:
        """Return up to a batch; nothing after `close`."""
        first = self._queue.get()
        batch = [] if first is None else [first]
        until = time.monotonic() + self._limits.wait_s
        while batch and len(batch) < self._classifier.batch_size:
            try:
                one = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if one is None:
                self._queue.put(None)
                break
            batch.append(one)
        return batch

    def _answers(self, batch: list[Waiting]) -> list[Answer]:
        self.num_batches += 1
        probabilities_BK, unlike_B = self._classifier.answers([view for _, view, _ in batch])
        decided_B = decisions_of(self._policy, probabilities_BK) if self._policy else [None] * len(batch)
        names = [name for name, _, _ in batch]
        return [Answer(*one) for one in zip(names, probabilities_BK, unlike_B, decided_B, strict=True)]
