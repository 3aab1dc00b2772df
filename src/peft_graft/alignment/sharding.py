"""One pass over the text on several processes: those of torchrun or accelerate, or tasks of Ray.

Every process goes over the same batches and runs its share of them; the merged statistics are those of one process.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_graft.alignment.collect import (
    PAIRING,
    CollectionSettings,
    Shard,
    Totals,
    Unfinished,
    collect_totals,
    empty_totals,
)
from peft_graft.alignment.layout import Wanted
from peft_graft.alignment.text import read_text
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.config import AlignConfig
from peft_graft.errors import GraftError, PlanError, not_installed
from peft_graft.models.loading import ModelPair
from peft_graft.models.pair import load_pair
from peft_graft.run import Run


@dataclass(frozen=True)
class RayPass:
    """A pass over text in parts on Ray; every node loads the models by name.

    Attributes:
        teacher, student: folders or hub ids. text: file or hub data set.
        config: where Ray is, the number of parts, and how models are loaded.
    """

    teacher: str
    student: str
    text: str
    config: AlignConfig

    @property
    def shards(self) -> int:
        """Number of parts."""
        return self.config.shards or os.cpu_count() or 1


def start_ray(address: str) -> Any:
    """Ray, connected to a cluster or started on this machine (``local``).

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise not_installed("ray", "study") from error
    if not ray.is_initialized():
        ray.init(
            address=None if address == "local" else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return ray


def collect_on_ray(
    plan: RayPass,
    models: ModelPair,
    wanted: Wanted,
    settings: CollectionSettings,
    run: Run,
    *,
    hold_out: bool,
    unfinished: Unfinished | None = None,
) -> tuple[Totals, PairingCounts]:
    """``collect_totals`` in parts, a task each; the part of a worker that dies is done again elsewhere.

    Args:
        models: the models here, for the shapes of what comes back.
        unfinished: a part that is done again goes on from its state there, where the nodes share that folder.

    Raises:
        PlanError: no node is large enough for a part.
    """
    config = plan.config
    ray = start_ray(str(config.ray))
    gpus = len({place for place in (config.device, config.student_device) if place and place.startswith("cuda")})
    offered = ray.cluster_resources()
    if offered.get("CPU", 0) < 1 or offered.get("GPU", 0) < gpus:
        raise PlanError(
            "no node has the resources of a shard",
            where=f"--ray {config.ray}",
            expected=f"1 CPU and {gpus} GPUs",
            found=f"{offered.get('CPU', 0):g} CPUs and {offered.get('GPU', 0):g} GPUs in all",
        )
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(run_part)
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
        run.progress(PAIRING, len(parts), plan.shards)
    totals, one = (empty_totals(models, wanted, hold_out=hold_out) for _ in range(2))
    for index in range(plan.shards):  # in order, whichever came first
        one.load(parts[index][0])
        totals.merge(one)
    counts = parts[0][1]
    counts.nonfinite_pairs = totals.nonfinite
    return totals, counts


def run_part(
    plan: RayPass,
    wanted: Wanted,
    settings: CollectionSettings,
    hold_out: bool,
    shard: Shard,
    unfinished: Unfinished | None,
) -> tuple[dict[str, Tensor], PairingCounts]:
    """One part on a worker."""
    models = load_pair(plan.teacher, plan.student, plan.config, tokenizers=True)
    samples = read_text(plan.text, plan.config.columns, plan.config.seed)
    totals, counts = collect_totals(
        models, samples, wanted, settings, hold_out=hold_out, shard=shard, unfinished=unfinished
    )
    return {key: value.cpu() for key, value in totals.tensors().items()}, counts
