"""The state of a run between two steps: networks, optimizer, and each rank's own BatchNorm statistics.

Legend: R ranks, F numbers in all running statistics of a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from wasteddp.errors import CheckpointError
from wasteddp.model.networks import running_statistics
from wasteddp.training.checkpoint.reader import Checkpoint
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimization import optimizers

_RANKS = "ranks"  # name of the state that holds each rank's own statistics
_STATISTICS = "running_statistics"
ONE_MOMENT = ("sgd", "lars")  # optimizers that keep one number per weight; the others keep two


class Stateful(Protocol):
    """Further state to save with the model and the optimizer, such as a moving average of the weights."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Any: ...


class RunState:
    """The state of one run, on all ranks.

    Args:
        model: with or without the wrappers of DDP and `torch.compile`.
        optimizer: not as Accelerate wraps it.
        further: other objects with a state, by the name of their file; the same on every rank. If one is a network, its
            running statistics differ between the ranks, as those of the model.
    """

    def __init__(
        self, runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, further: Mapping[str, Stateful]
    ) -> None:
        self._runtime, self._optimizer, self._further = runtime, optimizer, further
        self._model: nn.Module = runtime.accelerator.unwrap_model(model, keep_torch_compile=False)
        networks = {name: thing for name, thing in further.items() if isinstance(thing, nn.Module)}
        self._networks: dict[str, nn.Module] = {"model": self._model, **networks}

    @property
    def model_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return the states of a checkpoint. All ranks.

        The networks' running statistics are the mean over the ranks, which any number of ranks can load. The state
        "ranks" holds each rank's own, so that the same number of ranks resumes bit for bit.
        """
        states: dict[str, Mapping[str, torch.Tensor]] = {
            "model": self._model.state_dict(keep_vars=True),  # detaching 320 tensors would take 0.4 ms
            "optimizer": optimizers.state_tensors(self._optimizer, self._model),
            **{name: thing.state_dict() for name, thing in self._further.items()},
        }
        if self._runtime.world_size == 1:
            return states
        of_ranks = {}
        for name, network in self._networks.items():
            if own := running_statistics(network):
                flat_RF = self._runtime.stack(torch.cat([tensor.reshape(-1) for tensor in own]))  # all ranks
                means = [torch.empty_like(tensor) for tensor in own]
                _fill(means, flat_RF.mean(0))
                names = {id(buffer): key for key, buffer in network.named_buffers()}
                states[name] = {**states[name], **{names[id(t)]: mean for t, mean in zip(own, means, strict=True)}}
                of_ranks[_own_statistics(name)] = flat_RF
        return {**states, _RANKS: of_ranks} if of_ranks else states

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint, after `Runtime.prepare`, which copies the state of rank 0 to all. All ranks.

        Raises:
            CheckpointError: on every rank: the checkpoint lacks a state that this run has.
        """
        with self._runtime.sharing_errors():
            if missing := self._further.keys() - checkpoint.states.keys():
                raise CheckpointError(
                    f"{checkpoint.path} has no state of: {', '.join(sorted(missing))}",
                    "the run would combine trained weights with a new state",
                    "restore the settings of that run, or set run.out to a new folder",
                )
        self._model.load_state_dict(checkpoint.states["model"])
        optimizers.load_state_tensors(self._optimizer, self._model, checkpoint.states["optimizer"])
        for name, thing in self._further.items():
            thing.load_state_dict(checkpoint.states[name])
        for name, network in self._networks.items():
            own = checkpoint.states.get(_RANKS, {}).get(_own_statistics(name))
            if own is not None and len(own) == self._runtime.world_size:  # another number of ranks uses the mean
                _fill(running_statistics(network), own[self._runtime.rank])
        self._runtime.load_scaler(checkpoint.progress.scaler)

    def reconcile(self) -> None:
        """Replace BatchNorm's running statistics by their mean over the ranks, which saw other images. All ranks."""
        self._runtime.average_(
            [tensor for network in self._networks.values() for tensor in running_statistics(network)]
        )


def room_for_checkpoint(model_bytes: int, *, optimizer: str, ema_decay: float) -> int:
    """Return the bytes of a checkpoint: the weights, their average, and the optimizer's moments."""
    return model_bytes * (1 + (ema_decay > 0) + (1 if optimizer in ONE_MOMENT else 2))


def room_for_run(model_bytes: int, checkpoint_bytes: int, *, keep_last: int) -> int:
    """Return the most bytes that checkpoints and bundles take: those kept, the best, and those being written."""
    return checkpoint_bytes * (keep_last + 2) + 2 * model_bytes


def _own_statistics(name: str) -> str:
    """Return the key of the ranks' own running statistics of a network."""
    return _STATISTICS if name == "model" else f"{name}_{_STATISTICS}"


def _fill(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    """Copy consecutive parts of `flat` into the tensors."""
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
