"""Counters of the server in Prometheus' text format, version 0.0.4.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from wasteddp.decisions.unlikeness import UNLIKE_FROM

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLOSED = ("too many", "waiting", "answering")  # as in `connections`
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counts of requests and images since the start. Used by the thread of the event loop alone."""

    def __init__(self) -> None:
        self._requests, self._images, self._closed = Counter[int](), Counter[str](), Counter[str]()
        self._classes, self._decisions, self._num_unlike = Counter[str](), Counter[str](), 0
        self.num_connections = 0
        self._in_bucket, self._sum_s = [0] * (len(_BOUNDS_S) + 1), 0.0

    @property
    def num_requests(self) -> int:
        return self._requests.total()

    @property
    def num_answered(self) -> int:
        return self._images["answered"]

    def count_request(self, status: int, seconds: float) -> None:
        self._requests[status] += 1
        self._in_bucket[bisect_left(_BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def count_unreadable(self) -> None:
        self._images["unreadable"] += 1

    def count_answer(self, class_name: str, decision: str | None, unlike: float | None) -> None:
        """Count an answered image, so that a change of what the camera sees can raise an alarm.

        Args:
            decision: a bin or a person; None: there is no policy.
            unlike: percentile of the image's unlikeness; None: not known.
        """
        self._images["answered"] += 1
        self._classes[class_name] += 1
        self._num_unlike += unlike is not None and unlike >= UNLIKE_FROM
        if decision is not None:
            self._decisions[decision] += 1

    def count_closed(self, why: str) -> None:
        """Count a connection that the server has ended: a reason in `CLOSED`."""
        self._closed[why] += 1

    def text(self, *, num_waiting: int, num_batches: int, doubtful: Mapping[str, int] | None = None) -> str:
        """Return all metrics.

        Args:
            num_waiting: images that were taken and not answered.
            num_batches: that were computed.
            doubtful: photos by result; None: the server keeps none.
        """
        requests, images = sorted(self._requests.items()), ("answered", "unreadable")
        buckets = zip((*_BOUNDS_S, "+Inf"), accumulate(self._in_bucket), strict=True)
        lines = [
            *_about("requests_total", "counter", "Requests to /predict by status."),
            *(f'wasteddp_requests_total{{status="{status}"}} {count}' for status, count in requests),
            *_about("images_total", "counter", "Images by result."),
            *(f'wasteddp_images_total{{result="{name}"}} {self._images[name]}' for name in images),
            *_about("classes_total", "counter", "Answered images by their most probable class."),
            *(f"wasteddp_classes_total{{class={_quoted(name)}}} {count}" for name, count in self._classes.items()),
            *_about("decisions_total", "counter", "Answered images by decision: a bin or a person."),
            *(f"wasteddp_decisions_total{{decision={_quoted(n)}}} {count}" for n, count in self._decisions.items()),
            *_about("unlike_total", "counter", f"Answered images of an unlikeness of {UNLIKE_FROM:g} or more."),
            f"wasteddp_unlike_total {self._num_unlike}",
            *_about("batches_total", "counter", "Batches that were computed."),
            f"wasteddp_batches_total {num_batches}",
            *_about("images_waiting", "gauge", "Images that were taken and not answered."),
            f"wasteddp_images_waiting {num_waiting}",
            *_about("request_seconds", "histogram", "From the headers of a request to its answer."),
            *(f'wasteddp_request_seconds_bucket{{le="{bound}"}} {count}' for bound, count in buckets),
            f"wasteddp_request_seconds_sum {self._sum_s:.6f}",
            f"wasteddp_request_seconds_count {self.num_requests}",
        ]
        lines += [
            *_about("connections", "gauge", "Open connections."),
            f"wasteddp_connections {self.num_connections}",
            *_about("connections_closed_total", "counter", "Connections that exceeded a limit, by what they did."),
            *(f'wasteddp_connections_closed_total{{why="{why}"}} {self._closed[why]}' for why in CLOSED),
        ]
        if doubtful is not None:
            lines += _about("doubtful_total", "counter", "Doubtful photos by result of keeping them.")
            lines += [f'wasteddp_doubtful_total{{result="{name}"}} {count}' for name, count in doubtful.items()]
        return "\n".join(lines) + "\n"


def _quoted(name: str) -> str:
    """Return a label's value. A byte that is not UTF-8 is written as an escape."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return '"' + text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'


def _about(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP wasteddp_{name} {text}", f"# TYPE wasteddp_{name} {kind}"
