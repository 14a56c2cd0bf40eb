"""The processes of an evaluation under `accelerate launch` or torchrun. Each takes a part of the split."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from wasteddp.errors import EXIT_USER_ERROR, LaunchError, WastedError
from wasteddp.parallel import num_usable_cores

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process. Without a launcher there is only one process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This process's share of the machine's cores."""
        return max(1, num_usable_cores() // self.local_world_size)

    def device(self, name: str) -> str:
        """Return this process's device for the option --device. Of several processes each takes a GPU of its own.

        Raises:
            LaunchError: one GPU is named for several processes.
        """
        if self.world_size == 1 or (name not in ("auto", "cuda") and not name.startswith("cuda:")):
            return name
        if name.startswith("cuda:"):
            raise LaunchError(
                f"--device {name} was given for {self.world_size} processes",
                "all of them would compute on one GPU",
                "leave --device out; each process then takes a GPU of its own",
            )
        return f"cuda:{self.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def gather(self, value: Value) -> list[Value]:
        """All ranks: return the values of all ranks, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Value] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def raise_together(self, error: WastedError | None) -> None:
        """All ranks: end all processes if one has an error. The first rank reports it; the others only exit."""
        first = next((found for found in self.gather(error) if found), None)
        if first and self.is_main:
            raise first
        if first:
            raise SystemExit(EXIT_USER_ERROR)


@contextmanager
def join_ranks(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the ranks that a launcher started. gloo is enough: they exchange results once for each split.

    Raises:
        LaunchError: they cannot be joined.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise LaunchError(
            f"the {world_size} launched processes cannot be joined: {str(error).splitlines()[0]}",
            "each would evaluate only its part of the split",
            "start them with `accelerate launch` or torchrun, or start one process without a launcher",
        ) from error
    ranks = Ranks(
        dist.get_rank(),
        world_size,
        int(environment.get("LOCAL_RANK", "0")),
        int(environment.get("LOCAL_WORLD_SIZE", world_size)),
    )
    torch.set_num_threads(ranks.cores)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
