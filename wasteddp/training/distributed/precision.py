"""Chooses the precision of a run: as set, as in the checkpoint it resumes from, or the faster one on the GPU.

bf16 and fp16 are equally fast in a GPU's matrix units, but not in the operations around them: on one H200, without
compilation, fp16 was 28 % faster, because torch uses cuDNN's BatchNorm for fp16 and not for bf16 (docs/notes.md).
Therefore `auto` measures.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from wasteddp.errors import LaunchError
from wasteddp.model import networks
from wasteddp.settings import Model

_LEAST_GAIN = 1.05  # of fp16 over bf16, which needs no loss scale and has the range of fp32
_MOST_IMAGES, _WARM_UP, _ROUNDS, _STEPS = 64, 3, 5, 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Kept:
    """Choices that a run keeps from its checkpoint: they were made on the machine that started it."""

    precision: str = ""  # "": there is no checkpoint
    compiles: bool | None = None  # None: there is no checkpoint, or it does not record this


NOTHING_KEPT = Kept()


@dataclass(frozen=True, slots=True)
class Precision:
    name: str  # fp32, bf16 or fp16
    reason: str
    images_per_s: dict[str, float] = field(default_factory=dict)  # by precision, of this process; only those measured


Measure = Callable[[Sequence[str]], dict[str, float]]  # images/s of each precision; empty if memory is lacking


def choose(
    asked: str,
    *,
    has_gpu: bool,
    kept: Kept,
    measure: Measure,
    may_measure: bool = True,
    is_speed_asked: bool = False,
) -> Precision:
    """Choose the precision for "auto", "fp32", "bf16" or "fp16".

    Args:
        measure: see `measure`; called only on a GPU, and only if its result is needed.
        may_measure: False if two runs must make the same choice.
        is_speed_asked: measure images/s even if the choice does not depend on it.
    """
    if not has_gpu:
        return _on_a_cpu(asked)
    card, has_bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    if asked != "auto":
        emulated = "" if asked != "bf16" or has_bf16 else f"; {card} emulates bf16, which is slower than fp16"
        chosen = Precision(asked, f"as set{emulated}")
    elif kept.precision and (has_bf16 or kept.precision != "bf16"):
        chosen = Precision(kept.precision, "as in the checkpoint")
    elif torch.cuda.get_device_capability() < (7, 0):
        chosen = Precision("fp32", f"{card} has no matrix units for fp16 or bf16")
    elif not has_bf16:
        chosen = Precision("fp16", f"{card} does not support bf16")
    elif not may_measure:
        chosen = Precision("bf16", f"{card} supports it; not measured, because run.deterministic is set")
    else:
        return _the_faster(card, measure(("bf16", "fp16")))
    return Precision(chosen.name, chosen.reason, measure((chosen.name,)) if is_speed_asked and may_measure else {})


def _the_faster(card: str, images_per_s: dict[str, float]) -> Precision:
    if not images_per_s:
        return Precision("bf16", f"{card} has too little free memory to measure whether fp16 is faster")
    bf16, fp16 = images_per_s["bf16"], images_per_s["fp16"]
    name = "fp16" if fp16 >= _LEAST_GAIN * bf16 else "bf16"
    reason = f"measured on {card} without compilation: bf16 {bf16:,.0f} images/s, fp16 {fp16:,.0f}"
    return Precision(name, reason, images_per_s)


def _on_a_cpu(asked: str) -> Precision:
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    device = "this CPU, with AVX512-BF16 or AMX," if supported else "this CPU, without AVX512-BF16 and AMX,"
    if asked == "auto" and supported:
        return Precision("bf16", f"{device} supports it")
    if asked == "auto":
        return Precision("fp32", f"{device} does not support bf16")
    if asked == "bf16" and not supported:
        return Precision("bf16", f"as set; {device} emulates it, which is slower than fp32")
    return Precision(asked, "as set")


def without_measuring(asked: str) -> str:
    """Return fp32, bf16 or fp16 without a measurement, for comparisons; "auto" prefers bf16 on a GPU."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return asked if asked != "auto" else "bf16" if has_bf16 else "fp16"
    return _on_a_cpu(asked).name


def refuse_impossible(asked: str, *, has_gpu: bool) -> None:
    """Refuse fp16 without a GPU, before the processes join: all of them end with the same message.

    Raises:
        LaunchError: fp16 without a GPU. Accelerate would compute in fp32 and report fp16.
    """
    if asked == "fp16" and not has_gpu:
        raise LaunchError(
            "precision is fp16 and there is no GPU",
            "the CPU would compute in fp32 and the log would report fp16",
            "set precision to auto, bf16 or fp32",
        )


def measure(
    model: Model, device: torch.device, precisions: Sequence[str], *, image_size: int, max_micro_batch: int
) -> dict[str, float]:
    """Measure images/s of forward and backward passes of the run's network in each precision, alternating; medians.

    The network has random weights and is freed at the end. The state of torch's random generators does not change.

    Returns:
        Images/s by precision; empty if not even one image fits into the memory.
    """
    num_images = min(max_micro_batch or _MOST_IMAGES, _MOST_IMAGES)
    found: dict[str, float] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while num_images and not found:
            try:
                found = _images_per_s(model, device, precisions, num_images, image_size)
            except torch.OutOfMemoryError:
                num_images //= 2
            if device.type == "cuda":  # after the handler: the error references the tensors of the attempt
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
    return found


def _images_per_s(
    model: Model, device: torch.device, precisions: Sequence[str], num_images: int, size: int
) -> dict[str, float]:
    layout = torch.channels_last if model.channels_last else torch.contiguous_format
    network = networks.build(model.arch, 10)
    networks.refuse_sizes(network, model.arch, [size])
    network = network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    images_BCHW = torch.rand(num_images, 3, size, size, device=device).contiguous(memory_format=layout)
    labels_B = torch.zeros(num_images, dtype=torch.int64, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in precisions}
    for number in range(_ROUNDS + 1):
        for name in precisions:
            began = time.perf_counter()
            for _ in range(_STEPS if number else _WARM_UP):
                with torch.autocast(device.type, _DTYPES[name], enabled=name != "fp32"):
                    loss = functional.cross_entropy(network(images_BCHW).float(), labels_B)
                loss.backward()  # type: ignore[no-untyped-call]
                network.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: _STEPS * num_images / statistics.median(taken[1:]) for name, taken in seconds.items()}
