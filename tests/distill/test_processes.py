"""A transfer by several processes is that of one, to the order in which sums are taken."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft_graft
import processes
import speech
from peft_graft import GraftConfig
from peft_graft.distill.training import Schedule, TrainingLoop
from peft_graft.errors import PlanError
from peft_graft.processes import Processes

STEPS = 12


def options(speakers: Path, out: Path) -> list[str]:
    return ["transfer", str(speakers / "module"), "--student", str(speakers / "stranger"), "--text",
            str(speakers / "prompts.jsonl"), "--format", speech.FORMAT, "--max-new-tokens", "8", "--polish", str(STEPS),
            "--max-prompts", "100", "--method", "fresh", "--out", str(out), "--json"]  # fmt: skip


def test_two_processes_of_torchrun_make_the_graft_that_one_makes(speakers, tmp_path) -> None:
    agent = processes.start(
        processes.torchrun,
        2,
        *options(speakers, tmp_path / "two" / "graft"),
        out=tmp_path / "out",
        err=tmp_path / "err",
    )
    config = GraftConfig(format=speech.FORMAT, max_new_tokens=8, max_prompts=100, polish=STEPS, method="fresh")
    out = tmp_path / "one"
    one = peft_graft.transfer(
        speakers / "module", speakers / "stranger", text=speakers / "prompts.jsonl", config=config, out=out
    ).report
    agent.join(300)
    assert agent.exitcode == 0, (tmp_path / "err").read_text()
    said = json.loads((tmp_path / "out").read_text())
    assert said["method"] == one.method, "one process speaks"
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["graft"]
    two = json.loads((tmp_path / "two" / "graft" / "graft.json").read_text())
    curve = [(point["step"], pytest.approx(point["divergence"], rel=1e-4)) for point in two["polish"]["curve"]]
    assert [(point.step, point.divergence) for point in one.polish.curve] == curve
    assert two["prompts"] == one.prompts.model_dump(mode="json")
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "two" / "graft"))
    for name, value in mine.items():
        assert (theirs[name] - value).norm() < 1e-3 * value.norm(), name


def in_a_group_without_gloo(index: int, port: int, found: str) -> None:
    """Stands for a script on GPUs: its group is said to know NCCL alone, and what it is asked to share is noted."""
    import torch.distributed as distributed

    os.environ.update(RANK=str(index), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    distributed.get_backend_config = lambda group=None: "cuda:nccl"
    made: list[str] = []
    new_group = distributed.new_group
    distributed.new_group = lambda **options: made.append(options["backend"]) or new_group(**options)
    own, sums = Processes.started(), torch.full((2,), float(index + 1))
    own.wait()
    own.add_up([sums])
    values = torch.full((1,), float(index))
    own.equal([values])
    said = [own.least(5 - index), own.of_first(lambda: index), own.of_all(index), sums.tolist(), values.tolist(), made]
    Path(f"{found}-{index}").write_text(json.dumps(said))


def test_where_the_group_of_a_script_takes_no_tensors_of_the_cpu_there_is_another(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [processes.start(in_a_group_without_gloo, index, port, tmp_path / "said") for index in range(2)]
    for one in started:
        one.join(120)
        assert one.exitcode == 0
    for index in range(2):
        said = json.loads((tmp_path / f"said-{index}").read_text())
        assert said == [4, 0, [0, 1], [3.0, 3.0], [0.0], ["gloo"]]


def test_shares_of_a_batch_add_up_to_the_whole(monkeypatch) -> None:
    """Of means over numbers that differ, and where a process has none of the rows."""
    target, sizes = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), [4, 1, 2, 6, 3]

    def gradient(rows: list[int], index: int, count: int) -> torch.Tensor:
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        sent: list[torch.Tensor] = []
        monkeypatch.setattr(Processes, "add_up", lambda self, tensors: sent.extend(one.clone() for one in tensors))
        monkeypatch.setattr(Processes, "of_first", lambda self, make: make())
        monkeypatch.setattr(Processes, "equal", lambda self, tensors: None)

        def loss(rows: list[int]) -> torch.Tensor:
            weights = torch.tensor([float(sizes[row]) for row in rows])
            return (model(target[rows]).square().flatten() * weights).sum() / weights.sum()

        loop = TrainingLoop(
            model, [1] * len(rows), loss, Schedule(steps=1, batch_size=len(rows), learning_rate=0.1),
            processes=Processes(index, count), weight=lambda rows: float(sum(sizes[row] for row in rows)),
        )  # fmt: skip
        loop.run()
        return sent[0]

    for rows in ([0, 1, 2, 3, 4], [0]):
        parts = torch.stack([gradient(rows, index, 3) for index in range(3)]).sum(0)
        weights = torch.tensor([float(sizes[row]) for row in rows])
        values = torch.ones(3, requires_grad=True)
        whole = ((target[rows] @ values).square() * weights).sum() / weights.sum()
        whole.backward()
        torch.testing.assert_close(parts[0], whole.detach())
        torch.testing.assert_close(parts[2:], values.grad)


def test_each_process_does_its_share_of_the_batches(monkeypatch) -> None:
    batches, done, told = [[3, 1], [0, 4], [2]], [], []

    def work(rows: list[int]) -> dict[int, int]:
        done.append(rows)
        return {row: 10 * row for row in rows}

    whole = Processes().of_batches(batches, work)
    assert (whole, done) == ({row: 10 * row for row in range(5)}, batches)
    monkeypatch.setattr(Processes, "of_all", lambda self, own: [own, {row: whole[row] for row in [0, 4]}])
    done.clear()
    assert Processes(0, 2).of_batches(batches, work, lambda *counts: told.append(counts)) == whole
    assert (done, told) == ([[3, 1], [2]], [(4, 5), (5, 5)])


def test_a_shelf_is_moved_by_one_process(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(Processes, "started", lambda: Processes(0, 2))
    with pytest.raises(PlanError, match="torchrun: a shelf is moved by one process"):
        peft_graft.transfer_all(["a", "b"], "student", out=tmp_path / "shelf")
