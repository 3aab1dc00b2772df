"""One pass over the text on several processes: those of torchrun or accelerate, or tasks of Ray.

Every process goes over the same batches and runs its share of them; the merged statistics are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

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
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.cluster import Tasks
from peft_graft.config import PairConfig
from peft_graft.errors import PlanError
from peft_graft.models.devices import gpus_of, on_worker
from peft_graft.models.loading import ModelPair
from peft_graft.models.pair import load_pair
from peft_graft.run import Run


@dataclass(frozen=True)
class RayPass:
    """A pass over text in parts on Ray; every node loads the models by name and reads the text for itself.

    Attributes:
        teacher, student: folders or hub ids. samples: reads the text; workers import it.
        config: where Ray is, the number of parts, and how models are loaded.
    """

    teacher: str
    student: str
    samples: Callable[[], Iterator[Sample]]
    config: PairConfig

    @classmethod
    def of(cls, models: ModelPair, samples: Callable[[], Iterator[Sample]], config: PairConfig) -> RayPass:
        """The pass of models that were loaded by name."""
        return cls(models.teacher.name, models.student.name, samples, config)


def check_text_on_ray(text: object) -> None:
    """Refuse text that workers on Ray cannot read.

    Raises:
        PlanError: it is in memory here.
    """
    if not isinstance(text, str | Path):
        raise PlanError(
            "processes on Ray read the text for themselves",
            where="text",
            expected="a file or a hub data set",
            found=type(text).__name__,
            fix="write it to a file",
        )


def check_models_on_ray(**models: object) -> None:
    """Refuse models, by their role, that workers on Ray cannot load.

    Raises:
        PlanError: one is live.
    """
    for role, model in models.items():
        if isinstance(model, nn.Module):
            raise PlanError(
                "processes on Ray load the models for themselves",
                where=role,
                expected="a folder or a hub id",
                found=f"a live {type(model).__name__}",
                fix="save it and name the folder, or leave --ray out",
            )


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
    config, count = plan.config, plan.config.parts
    tasks = Tasks(
        str(config.ray),
        run_part,
        of="shard",
        gpus=len(gpus_of(config.device, config.student_device)),
        shared=(plan, dict(wanted), settings, hold_out, unfinished),
    )
    parts: dict[int, tuple[dict[str, Tensor], PairingCounts]] = {}
    with closing(tasks.results([Shard(index, count)] for index in range(count))) as found:
        for index, part in found:
            parts[index] = part
            run.progress(PAIRING, len(parts), count)
    totals, one = (empty_totals(models, wanted, hold_out=hold_out) for _ in range(2))
    for index in range(count):  # in order, whichever came first
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
    unfinished: Unfinished | None,
    shard: Shard,
) -> tuple[dict[str, Tensor], PairingCounts]:
    """One part on a worker."""
    models = load_pair(plan.teacher, plan.student, on_worker(plan.config), tokenizers=True)
    totals, counts = collect_totals(
        models, plan.samples(), wanted, settings, hold_out=hold_out, shard=shard, unfinished=unfinished
    )
    return {key: value.cpu() for key, value in totals.tensors().items()}, counts
