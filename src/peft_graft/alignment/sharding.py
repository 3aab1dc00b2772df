"""One pass over the text on several processes: those of torchrun or accelerate, or tasks of Ray.

Every process goes over the same batches and runs its share of them; the merged statistics are those of one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_graft.alignment.collect import CollectionSettings, Shard, Totals, Unfinished, collect_totals, empty_totals
from peft_graft.alignment.layout import Wanted
from peft_graft.alignment.text import read_text
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.errors import DependencyError, GraftError, PlanError
from peft_graft.models.loading import Loading, ModelHandle, load_model
from peft_graft.options import Progress


@dataclass(frozen=True)
class RayShards:
    """A pass in parts on Ray.

    Attributes:
        address: of the cluster, or ``local`` to use this machine. shards: number of parts.
        teacher, student: names that every node can load.
        text, columns, seed, device, student_device, dtype: as for ``align``.
    """

    address: str
    shards: int
    teacher: str
    student: str
    text: str
    columns: Sequence[str] | None
    seed: int
    device: str
    student_device: str
    dtype: str


def this_process() -> Shard:
    """The part of this process among those that torchrun or accelerate started; the whole where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return Shard()
    import torch.distributed as processes

    if not processes.is_initialized():
        processes.init_process_group("gloo")
    return Shard(processes.get_rank(), processes.get_world_size())


def least_of_all(value: int, shard: Shard) -> int:
    """The least of what the processes have each."""
    if shard.count == 1:
        return value
    import torch
    import torch.distributed as processes

    least = torch.tensor(value)
    processes.all_reduce(least, processes.ReduceOp.MIN)
    return int(least)


def wait_for_others(shard: Shard) -> None:
    """Return when all processes have come here."""
    if shard.count > 1:
        import torch.distributed as processes

        processes.barrier()


def start_ray(address: str) -> Any:
    """Ray, connected to a cluster or started on this machine (``local``).

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise DependencyError("ray is not installed", fix="pip install 'peft-graft[study]'") from error
    if not ray.is_initialized():
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return ray


def collect_on_ray(
    plan: RayShards,
    teacher: ModelHandle,
    student: ModelHandle,
    wanted: Wanted,
    settings: CollectionSettings,
    progress: Progress | None = None,
    *,
    hold_out: bool,
    unfinished: Unfinished | None = None,
) -> tuple[Totals, PairingCounts]:
    """``collect_totals`` in parts, a task each; the part of a worker that dies is done again elsewhere.

    Args:
        teacher, student: the models here, for the shapes of what comes back.
        unfinished: a part that is done again goes on from its state there, where the nodes share that folder.

    Raises:
        PlanError: no node has room for a part.
    """
    ray = start_ray(plan.address)
    gpus = len({place for place in (plan.device, plan.student_device) if place.startswith("cuda")})
    room = ray.cluster_resources()
    if room.get("CPU", 0) < 1 or room.get("GPU", 0) < gpus:
        raise PlanError(
            "no node has room for a shard",
            where=f"--ray {plan.address}",
            expected=f"1 CPU and {gpus} GPUs",
            found=f"{room.get('CPU', 0):g} CPUs and {room.get('GPU', 0):g} GPUs in all",
        )
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(_part)
    running = {
        task.remote(plan, dict(wanted), settings, hold_out, Shard(index, plan.shards), unfinished): index
        for index in range(plan.shards)
    }
    parts: dict[int, tuple[dict[str, Tensor], PairingCounts]] = {}
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        try:
            parts[running.pop(ready[0])] = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GraftError) else error) from None
        if progress:
            progress("pairing tokens", len(parts), plan.shards)
    totals, one = (empty_totals(teacher, student, wanted, hold_out=hold_out) for _ in range(2))
    for index in range(plan.shards):  # in order, whichever came first
        one.load(parts[index][0])
        totals.merge(one)
    counts = parts[0][1]
    counts.nonfinite_pairs = totals.nonfinite
    return totals, counts


def _part(
    plan: RayShards,
    wanted: Wanted,
    settings: CollectionSettings,
    hold_out: bool,
    shard: Shard,
    unfinished: Unfinished | None,
) -> tuple[dict[str, Tensor], PairingCounts]:
    """One part on a worker."""
    teacher, student = (
        load_model(name, Loading(device=device, dtype=plan.dtype), role=role, tokenizer=True)
        for name, device, role in (
            (plan.teacher, plan.device, "teacher"),
            (plan.student, plan.student_device, "student"),
        )
    )
    samples = read_text(plan.text, plan.columns, plan.seed)
    totals, counts = collect_totals(
        teacher, student, samples, wanted, settings, hold_out=hold_out, shard=shard, unfinished=unfinished
    )
    return {key: value.cpu() for key, value in totals.tensors().items()}, counts
