"""`run.deterministic`: two runs are equal bit for bit, also if one of them was killed and resumed.

Two kinds of sums have no fixed order. On a GPU, some kernels use atomic additions: torch is set to avoid them, and
cuBLAS and cuDNN to use the same algorithm each time. Between ranks, DDP's all-reduce adds the ranks' parts in an order
that depends on the position of a gradient in its bucket, and DDP rebuilds its buckets after the first step of each
start. With three or more ranks, the first step after a resume is then rounded differently from the same step of an
uninterrupted run, also on a CPU. Therefore a communication hook adds the parts in the order of the ranks.

This module neither synchronizes with a GPU nor initializes CUDA.

Legend: R ranks, N numbers in a rank's share of a bucket, M = R x N including the padding.
"""

# no `from __future__ import annotations`: DDP compares the annotations of its hook with types

import os

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import nn

_CUBLAS, _CUBLAS_FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")

# From torch's errors for an operation without a deterministic kernel (ATen/Context.cpp). The second one, about cuBLAS,
# no longer exists in 2.14.
_WORDS = ("does not have a deterministic implementation", "this operation is not deterministic because")


def demand(*, compiles: bool) -> None:
    """Make torch deterministic in this process, permanently. Call it before the first matrix product on a GPU and
    before NCCL starts.

    Of torch's list of operations without a deterministic kernel, this program uses none in a way that matters:
    - Adaptive average pooling to 1 x 1 is a mean (ATen/native/AdaptiveAveragePooling.cpp).
    - The kernel of the loss for [B, K] adds in a fixed order, unlike that for images.
    - The backward pass of max pooling on CUDA gathers, with a thread for each input, in both memory formats
      (ATen/native/cuda/DilatedMaxPool2d.cu).
    - Of interpolation only the backward pass is on the list.
    - scatter_add_ adds integers here.

    Args:
        compiles: whether torch.compile will be used; importing its settings takes seconds.
    """
    if os.environ.get(_CUBLAS) not in _CUBLAS_FIXED:
        os.environ[_CUBLAS] = _CUBLAS_FIXED[0]  # read at the first matrix product; torch refuses any other value
    # A reduction in the NVLink switch has no fixed order (according to its maintainers: NVIDIA/nccl issue 1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # the same as use_deterministic_algorithms(True), which in torch 2.14 imports the compiler for seconds
    torch.set_deterministic_debug_mode("error")
    # otherwise torch fills each new tensor; nothing here reads uninitialised memory (cost: docs/notes.md)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if compiles:
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):  # do not let measured times decide the order of additions
            inductor.deterministic = True


def lacks_a_kernel(error: Exception) -> bool:
    """Whether torch refused an operation because of `demand`."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def add_in_order(ddp: nn.parallel.DistributedDataParallel, dtype: torch.dtype) -> None:
    """Register a hook that computes the mean gradient as (rank 0 + rank 1 + ...) / R. All ranks, before the first step.

    It sends as many bytes as an all-reduce, in two messages: each number's parts go to one rank, and the means to all
    ranks. In addition, the backward pass waits for each message.

    Args:
        dtype: of the messages; the sum is in fp32.
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
