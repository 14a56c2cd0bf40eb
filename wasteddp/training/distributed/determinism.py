"""`run.deterministic`: the same bits from each run, and from a killed one as from an undisturbed one.

Two things add in an order that is not fixed. On a GPU, kernels with atomic additions: torch is told to take others, and
cuBLAS and cuDNN to keep to theirs. Between ranks, DDP's all-reduce: where in a message a gradient lies decides in which
order the ranks' parts are added, and DDP lays its messages out again after the first step of each start. With three
ranks or more, the first step after a resume is then rounded otherwise than the same step of an undisturbed run, on a
CPU too. So the ranks' parts are added in the order of the ranks.

Nothing here waits for a GPU or starts CUDA.

Legend: R ranks, N numbers of a rank's share of a message, M = R x N with the padding.
"""

# no `from __future__ import annotations`: DDP compares the annotations of its hook with types

import os

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import nn

_CUBLAS, _CUBLAS_FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")

# Of torch's errors for an operation that has no such kernel (ATen/Context.cpp); the second, of cuBLAS, is gone in 2.14.
_WORDS = ("does not have a deterministic implementation", "this operation is not deterministic because")


def demand(*, compiles: bool) -> None:
    """Of this process, for as long as it lives; before its first multiplication on a GPU and before NCCL.

    What of torch's own list of operations without such a kernel concerns this program: adaptive average pooling does
    not, since pooling to 1 x 1 is a mean (ATen/native/AdaptiveAveragePooling.cpp); nor the loss, whose kernel for
    [B, K] adds in a fixed order, unlike that for images; nor max pooling, whose backward pass on CUDA gathers, a thread
    for each input, in both memory formats (ATen/native/cuda/DilatedMaxPool2d.cu); nor interpolation, of which only the
    backward pass is on it. scatter_add_ counts whole numbers here.

    Args:
        compiles: whether torch.compile will be used: its settings take seconds to import.
    """
    if os.environ.get(_CUBLAS) not in _CUBLAS_FIXED:
        os.environ[_CUBLAS] = _CUBLAS_FIXED[0]  # read at the first multiplication; torch refuses any other value
    # A switch that adds for NCCL does not add in a fixed order (its maintainers: NVIDIA/nccl issue 1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # the same as use_deterministic_algorithms(True), which in torch 2.14 imports the compiler: seconds a start
    torch.set_deterministic_debug_mode("error")
    # else each new tensor is filled; nothing here reads memory that it has not written (cost: docs/notes.md)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiles:
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):  # no choice by measured time where it changes the order of additions
            inductor.deterministic = True


def lacks_a_kernel(error: Exception) -> bool:
    """Whether torch refuses an operation because of `demand`."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def add_in_order(ddp: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> None:
    """All ranks, before the first step: the gradients' mean is (rank 0 + rank 1 + ...) / R, wherever they lie.

    As many bytes as an all-reduce sends, in two messages: of each number's parts to one rank, and of the means to all.
    What it costs besides is that the backward pass waits for each message.

    Args:
        dtype: of what is sent; added are fp32.
    """
    ddp.register_comm_hook(dtype, _mean_in_order)


def _mean_in_order(
    dtype: torch.dtype,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    own, num_ranks = bucket.buffer(), dist.get_world_size()
    sent_M = nn.functional.pad(own.to(dtype), (0, -own.numel() % num_ranks))
    parts_M = torch.empty_like(sent_M)
    dist.all_to_all_single(parts_M, sent_M)
    first_N, *others = parts_M.chunk(num_ranks)
    total_N = first_N.float()
    for part_N in others:
        total_N = total_N + part_N
    means_M = list(parts_M.chunk(num_ranks))
    dist.all_gather(means_M, (total_N / num_ranks).to(dtype))
    own.copy_(torch.cat(means_M)[: own.numel()])
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(own)
    return done
