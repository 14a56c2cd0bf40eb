"""Code that runs inside a rank: the tiny network, and the faults that only the process itself can cause.

It replaces Python's own calls (os.fsync, os.rename, os.replace, io.open, Path.read_bytes), only for paths of the run's
checkpoints and model. The rest of the program is unchanged.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wasteddp.model import networks
from wasteddp.training import session

from .events import Event


class Tiny(nn.Module):
    """A network of 10,000 parameters instead of 11 million, with BatchNorm: a save or a step takes milliseconds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=4)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Conv2d(16, 32, 3)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images_BCHW)))
        hidden = torch.relu(self.bn2(self.layer1(hidden)))
        logits_BK: torch.Tensor = self.fc(hidden.mean((2, 3)))
        return logits_BK


def prepare(event: Event | None, run: Path, rank: int) -> None:
    """Install the tiny network and the event's fault, before `train.main`."""
    networks.build = lambda arch, num_classes, **_: Tiny(num_classes)  # type: ignore[assignment, return-value]
    if event is None:
        return
    is_target = event.target == "all" or rank == (0 if event.target == "first" else event.processes - 1)
    if event.kind == "save" and rank == 0:
        _at_writes(run, event.nth, "", lambda *_: _die(event))
    elif event.kind == "fault" and rank == 0:
        _at_writes(run, event.nth, event.operation, lambda file, content: _fail(event, file, content))
    elif event.kind == "epoch" and is_target:
        _at_evaluation(event)
    elif event.kind == "read" and is_target:
        _at_reads(run, event)


def _die(event: Event) -> None:
    if event.target == "all" and event.signal == "SIGKILL":
        os.killpg(0, signal.SIGKILL)  # the ranks of an attempt are a process group
    os.kill(os.getpid(), signal.Signals[event.signal])  # one signal per rank: a second SIGINT would kill it


def _fail(event: Event, file: Any, content: bytes) -> None:
    if event.short:
        file.write(content[: len(content) // 2])
        file.flush()
    raise OSError(event.error, os.strerror(event.error))


def _at_writes(run: Path, nth: int, only: str, act: Callable[[Any, bytes], None]) -> None:
    """Call `act` instead of the nth operation, counted over all kinds or over `only`."""
    done = 0

    def happens(kind: str, path: str) -> bool:
        nonlocal done
        inside = path.startswith((str(run / "checkpoints"), str(run / "model"))) and not path.endswith(".lock")
        if not inside or (only and kind != only):
            return False
        done += 1
        return done == nth

    real_open, real_fsync, real_rename, real_replace = io.open, os.fsync, os.rename, os.replace

    class Watched:
        def __init__(self, file: Any, path: str) -> None:
            self._file, self._path = file, path

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: bytes) -> int:
            if happens("write", self._path):
                act(self._file, content)
            return int(self._file.write(content))

    def open_(file: Any, mode: str = "r", *rest: Any, **how: Any) -> Any:
        opened = real_open(file, mode, *rest, **how)
        return Watched(opened, str(file)) if "w" in mode and "b" in mode else opened

    def fsync(descriptor: int) -> None:
        if happens("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            act(None, b"")
        real_fsync(descriptor)

    def renaming(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **how: Any) -> None:
            if happens("rename", str(source)):
                act(None, b"")
            real(source, target, **how)

        return rename

    io.open, os.fsync = open_, fsync  # type: ignore[assignment]
    os.rename, os.replace = renaming(real_rename), renaming(real_replace)


def _at_evaluation(event: Event) -> None:
    real, seen = session.evaluate, 0

    def evaluate(*arguments: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == event.nth:
            _die(event)
        return real(*arguments, **named)

    session.evaluate = evaluate


def _at_reads(run: Path, event: Event) -> None:
    """Make the first read of weights in the newest checkpoint fail; the files on the disk are whole."""
    real, done = Path.read_bytes, False

    def read_bytes(self: Path) -> bytes:
        nonlocal done
        if done or self.name != "model.safetensors" or run / "checkpoints" not in self.parents:
            return real(self)
        done = True
        if event.error:
            raise OSError(event.error, os.strerror(event.error), str(self))
        content = bytearray(real(self))
        content[len(content) // 2] ^= 1
        return bytes(content)

    Path.read_bytes = read_bytes  # type: ignore[method-assign]
