"""The processes of one run, which torchrun or accelerate start: all do the same, and share what takes long."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")
#: One process may work for hours while the others wait for what it makes.
_PATIENCE = timedelta(days=7)
#: torch's group of all processes -> ours beside it.
_beside: dict[ProcessGroup | None, ProcessGroup] = {}


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    What they call here all of them have to call, and in the same order: it returns when each has.

    Attributes:
        index: of this process, from 0. count: of all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def started(cls) -> Processes:
        """As the environment says that this process was started; none is waited for."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls()
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.index == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if not self.alone:
            distributed, group = _group()
            distributed.barrier(group=group)

    def least(self, value: int) -> int:
        """The least of what the processes have each."""
        if self.alone:
            return value
        import torch

        distributed, group = _group()
        least = torch.tensor(value)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=group)
        return int(least)

    def of_first(self, make: Callable[[], _T]) -> _T:
        """What the first process makes, for all of them; the others make nothing."""
        if self.alone:
            return make()
        held = [make() if self.first else None]
        distributed, group = _group()
        distributed.broadcast_object_list(held, group=group)
        return held[0]  # type: ignore[return-value]

    def of_all(self, own: _T) -> list[_T]:
        """What each process has, in their order."""
        if self.alone:
            return [own]
        found: list[_T] = [own] * self.count
        distributed, group = _group()
        distributed.all_gather_object(found, own, group=group)
        return found

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """This process's part of something: every so many of it."""
        return list(rows[self.index :: self.count])

    def of_batches(
        self,
        batches: Sequence[Sequence[int]],
        work: Callable[[Sequence[int]], Mapping[int, _T]],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[int, _T]:
        """What ``work`` makes of the rows of each batch, by row: of every so many batches here, of others elsewhere.

        Args:
            progress: told of (rows so far, rows).
        """
        own: dict[int, _T] = {}
        total = sum(map(len, batches))
        for rows in self.share(batches):
            own |= work(rows)
            if progress:
                progress(min(len(own) * self.count, total), total)
        return {row: value for found in self.of_all(own) for row, value in found.items()}

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor, in place, the sum of those of all processes: the same bits in each."""
        if self.alone:
            return
        distributed, group = _group()
        for tensor in tensors:
            distributed.all_reduce(tensor, group=group)

    def equal(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor, in place, the values of the first process's."""
        if self.alone:
            return
        distributed, group = _group()
        for tensor in tensors:
            distributed.broadcast(tensor, 0, group=group)


def local_index() -> int | None:
    """The number of this process among those of its machine; None where it was started by itself."""
    found = os.environ.get("LOCAL_RANK")
    return None if found is None else int(found)


def local_count() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _group() -> tuple[ModuleType, ProcessGroup | None]:
    """torch's ``distributed``, and the group in which the processes share, made when they first do; None is torch's.

    A script's own group, such as accelerate makes on GPUs, may know NCCL alone, which takes no tensors of the CPU; then
    there is another beside it.
    """
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    if "gloo" in str(distributed.get_backend_config()):
        return distributed, None
    whole = distributed.group.WORLD
    if whole not in _beside:
        _beside.clear()  # of a group that is no more
        _beside[whole] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return distributed, _beside[whole]


#: One process.
ALONE = Processes()
