"""The teacher's answers to prompts in tasks of Ray: each loads the teacher and answers a share of the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.cluster import Tasks
from peft_graft.config import GraftConfig
from peft_graft.distill.generate import Reading, generate_batch
from peft_graft.models.devices import gpus_of, on_worker
from peft_graft.models.loading import load_model
from peft_graft.models.pair import loading_of

#: Rows of one batch: the tokens of prompts, or of what is answered to them, by the prompt's number.
Rows = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class RayTeacher:
    """The teacher as every node finds it.

    Attributes:
        name: folder or hub id of its base. config: where Ray is, the number of shares, and how the base is loaded.
    """

    name: str
    config: GraftConfig

    def answers(self, raw: RawCheckpoint, batches: Sequence[Rows], reading: Reading, *, bf16: bool) -> Iterator[Rows]:
        """The tokens of answers to batches of prompts, share by share as they are there.

        Args:
            raw: the module, which goes to every node. bf16: forward passes in mixed precision.

        Raises:
            PlanError: no node is large enough. ModelError, DeviceError: a node cannot load the base.
        """
        count = min(self.config.parts, len(batches))
        tasks = Tasks(
            str(self.config.ray),
            answer_share,
            of="shard",
            gpus=len(gpus_of(self.config.device)),
            shared=(self, raw, reading, bf16),
        )
        with closing(tasks.results([batches[index::count]] for index in range(count))) as shares:
            for _, share in shares:
                yield share


def answer_share(
    teacher: RayTeacher, raw: RawCheckpoint, reading: Reading, bf16: bool, batches: Sequence[Rows]
) -> dict[int, list[int]]:
    """The tokens of answers to a share of the batches, on a worker."""
    config = on_worker(teacher.config.model_copy(update={"student_device": None}))
    base = load_model(teacher.name, loading_of(config, "teacher"), role="teacher")
    attached = attach(raw, base, bf16=bf16, speaks=True)
    found: dict[int, list[int]] = {}
    for rows in batches:
        said = generate_batch(attached.model, list(rows.values()), reading, bf16=attached.bf16)
        found.update(zip(rows, said, strict=True))
    return found
