"""What a run is made of between two steps: networks, optimizer, and each rank's own BatchNorm statistics.

Legend: R ranks, F numbers in all running statistics of a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from wasteddp.errors import CheckpointError
from wasteddp.model.resnet import running_statistics
from wasteddp.settings import Settings
from wasteddp.training.checkpoint.reader import Checkpoint
from wasteddp.training.distributed.runtime import Runtime
from wasteddp.training.optimization import optimizers

_RANKS = "ranks"  # the state that holds what each rank has of its own
_STATISTICS = "running_statistics"
ONE_MOMENT = ("sgd", "lars")  # optimizers that keep one number a weight; the others keep two


class Stateful(Protocol):
    """What may be kept beside the model and the optimizer, such as a moving average of the weights."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> Any: ...


class RunState:
    """Of one run, on all ranks.

    Args:
        model: bare, or as DDP or `torch.compile` wrap it.
        optimizer: bare, not as Accelerate wraps it.
        further: other things with a state, by the name that their file gets; the same on every rank. Of networks the
            running statistics are each rank's own, as the model's are.
    """

    def __init__(
        self, world: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer, further: Mapping[str, Stateful]
    ) -> None:
        self._world, self._optimizer, self._further = world, optimizer, further
        self._model: nn.Module = world.accelerator.unwrap_model(model, keep_torch_compile=False)
        networks = {name: thing for name, thing in further.items() if isinstance(thing, nn.Module)}
        self._networks: dict[str, nn.Module] = {"model": self._model, **networks}

    @property
    def model_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """All ranks: what a checkpoint holds. The networks' running statistics are the mean over the ranks, for any
        number of them to load; each rank's own are kept beside it, so that the same number goes on bit for bit."""
        states: dict[str, Mapping[str, torch.Tensor]] = {
            "model": self._model.state_dict(keep_vars=True),  # 320 detached tensors would cost the loop 0.4 ms
            "optimizer": optimizers.state_tensors(self._optimizer, self._model),
            **{name: thing.state_dict() for name, thing in self._further.items()},
        }
        if self._world.world_size == 1:
            return states
        of_ranks = {}
        for name, network in self._networks.items():
            if own := running_statistics(network):
                flat_RF = self._world.stack(torch.cat([tensor.reshape(-1) for tensor in own]))  # all ranks
                means = [torch.empty_like(tensor) for tensor in own]
                _fill(means, flat_RF.mean(0))
                names = {id(buffer): key for key, buffer in network.named_buffers()}
                states[name] = {**states[name], **{names[id(t)]: mean for t, mean in zip(own, means, strict=True)}}
                of_ranks[_own_statistics(name)] = flat_RF
        return {**states, _RANKS: of_ranks} if of_ranks else states

    def restore(self, checkpoint: Checkpoint) -> None:
        """All ranks, after `prepare`, which gives every rank the state of the first: the checkpoint's state.

        Raises:
            CheckpointError: on every rank: it lacks a state that this run has.
        """
        with self._world.together():
            if missing := self._further.keys() - checkpoint.states.keys():
                raise CheckpointError(
                    f"{checkpoint.path} has no state of: {', '.join(sorted(missing))}",
                    "the run would go on with a fresh one beside trained weights",
                    "restore the settings of that run, or set run.out to a new folder",
                )
        self._model.load_state_dict(checkpoint.states["model"])
        optimizers.load_state_tensors(self._optimizer, self._model, checkpoint.states["optimizer"])
        for name, thing in self._further.items():
            thing.load_state_dict(checkpoint.states[name])
        for name, network in self._networks.items():
            own = checkpoint.states.get(_RANKS, {}).get(_own_statistics(name))
            if own is not None and len(own) == self._world.world_size:  # another number of ranks takes the mean
                _fill(running_statistics(network), own[self._world.rank])
        self._world.load_scaler(checkpoint.progress.scaler)

    def reconcile(self) -> None:
        """All ranks: BatchNorm's running statistics become their mean, since each rank saw other images."""
        self._world.average_([tensor for network in self._networks.values() for tensor in running_statistics(network)])


def room_for_checkpoint(settings: Settings, model_bytes: int) -> int:
    """Bytes of one: the weights, their average, and one more for each moment that the optimizer keeps."""
    moments = 1 if settings.optimizer.name in ONE_MOMENT else 2
    return model_bytes * (1 + (settings.train.ema_decay > 0) + moments)


def room_for_run(settings: Settings, model_bytes: int) -> int:
    """Bytes that checkpoints and bundles take at most: those kept, the best, and the ones being written."""
    return room_for_checkpoint(settings, model_bytes) * (settings.checkpoint.keep_last + 2) + 2 * model_bytes


def _own_statistics(name: str) -> str:
    """What the ranks' own running statistics of a network are called."""
    return _STATISTICS if name == "model" else f"{name}_{_STATISTICS}"


def _fill(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
    """Writes the parts of `flat`, one after the other, into the tensors."""
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
