"""Transfers on Ray are those of one process; what a dead worker had is done again, and what is done is not repeated."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import peft_graft
import processes
import speech
import tiny
from peft_graft import Callback, GraftConfig, ShelfReport, _transfer_all
from peft_graft.cluster import Tasks
from peft_graft.distill import answers_on_ray
from peft_graft.errors import DeviceError, PlanError
from peft_graft.models.devices import on_worker
from peft_graft.processes import Processes
from peft_graft.shelf import SHELF

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
SPOKEN = GraftConfig(format=speech.FORMAT, max_new_tokens=8, max_prompts=100, polish=4, method="fresh")
PLAIN = GraftConfig(method="ridge", polish=0, max_tokens=1500, head="carry")
SHELVED = ["first", "taken", "broken", "second"]


class Impatient(Callback):
    """Ends a run when the first answers are there."""

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == "asking the teacher" and done:
            raise KeyboardInterrupt


def lose(mark: Path) -> None:
    """Kill the worker that comes here first."""
    with contextlib.suppress(FileExistsError):
        mark.touch(exist_ok=False)
        os._exit(1)


def spoken(speakers: Path, out: Path, *callbacks: Callback, **more: object) -> peft_graft.Graft:
    return peft_graft.transfer(
        speakers / "module", speakers / "stranger", text=speakers / "prompts.jsonl", out=out,
        config=SPOKEN.model_copy(update=more), callbacks=callbacks,
    )  # fmt: skip


def shelf(root: Path, world: Path, **more: object) -> ShelfReport:
    return peft_graft.transfer_all(
        [root / name for name in SHELVED], "narrow", text=world / "text.txt", out=root / "shelf",
        config=PLAIN.model_copy(update=more),
    )  # fmt: skip


def fail(number: int) -> None:
    raise PlanError("no task can do this", where=str(number))


def die(number: int) -> None:
    if number:
        os._exit(1)


def refusals() -> list[str]:
    """What is said where there is no cluster, no room in it, or an error in a task, and where workers die over it."""
    found = []
    for address, gpus in (("nowhere", 0), ("local", 64), ("local", 0)):
        with pytest.raises(PlanError) as caught:
            list(Tasks(address, fail, of="shard", gpus=gpus).results([[1]]))
        found.append(str(caught.value))
    with pytest.raises(DeviceError) as died:
        list(Tasks("local", die, of="shard").results([[1]]))
    found.append(str(died.value))
    ended = Tasks("local", die, of="shard", lost=lambda number, error: f"{number} {error}").results([[1], [0]])
    return [*found, [result and result[:20] for _, result in sorted(ended)]]


def on_ray(speakers: Path, world: Path, root: Path) -> None:
    """All of it in one cluster: workers take long to start."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[on_ray.__module__])  # workers do not import tests
    os.environ |= {"RAY_worker_niceness": "0"}  # else everything else goes first, the tests beside it too
    answer, move = answers_on_ray.answer_share, _transfer_all.move_module
    asked = root / "asked"
    asked.mkdir()

    def share(*given: Sequence) -> object:
        rows = [row for batch in given[-1] for row in batch]
        if (root / "interrupted").exists():
            lose(root / "lost-share")
        (asked / f"{min(rows)}").write_text(json.dumps(rows))
        return answer(*given)

    def module(*given: object) -> object:
        if given[-1].folder == "second":
            lose(root / "lost-module")
        return move(*given)

    (root / "refused").write_text(json.dumps(refusals()))
    answers_on_ray.answer_share, _transfer_all.move_module = share, module
    with pytest.raises(KeyboardInterrupt):
        spoken(speakers, root / "spoken", Impatient(), ray="local", shards=3)
    (root / "interrupted").touch()
    (store,) = (root / "spoken.unfinished").glob("teacher-answers-*")
    (root / "stored").write_text(store.read_text())
    shutil.rmtree(asked)
    asked.mkdir()
    spoken(speakers, root / "spoken", ray="local", shards=3)
    plain = PLAIN.model_copy(update={"ray": "local", "shards": 3})
    peft_graft.transfer(root / "first", world / "narrow", text=world / "text.txt", config=plain, out=root / "plain")
    os.chdir(world)  # where the student is named from
    (root / "report").write_text(shelf(root, world, ray="local").model_dump_json())
    (root / "again").write_text(shelf(root, world, ray="local").model_dump_json())


@pytest.fixture(scope="module")
def driven(speakers: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a driver of Ray left, beside modules of one teacher and a folder without any."""
    root = tmp_path_factory.mktemp("driven")
    shutil.copytree(world / "lora", root / "first")
    shutil.copytree(world / "lora", root / "taken")
    tiny.peft_lora(root / "second", world / "teacher", targets=["key", "dense"], seed=7)
    (root / "broken").mkdir()
    (root / "shelf" / "taken").mkdir(parents=True)
    driver = processes.start(on_ray, speakers, world, root, out=root / "out", err=root / "err")
    driver.join(400)
    assert driver.exitcode == 0, (root / "err").read_text()[-3000:]
    return root


def tensors(graft: Path) -> dict[str, torch.Tensor]:
    return load_file(graft / "adapter_model.safetensors")


def told(graft: Path) -> dict:
    """What a graft's report says, but for times and where it was made."""
    report = json.loads((graft / "graft.json").read_text())
    for name in ("seconds", "settings"):
        del report[name]
    for model in ("teacher", "student"):
        del report["cost"][model]["seconds"]
    return report


@needs_ray
def test_answers_on_ray_are_those_of_one_process_though_a_share_was_lost(driven, speakers, tmp_path) -> None:
    spoken(speakers, tmp_path / "spoken")
    assert (driven / "lost-share").exists()
    mine, theirs = tensors(tmp_path / "spoken"), tensors(driven / "spoken")
    assert all(theirs[name].equal(value) for name, value in mine.items())
    assert told(tmp_path / "spoken") == told(driven / "spoken")


@needs_ray
def test_an_interrupted_run_asks_for_what_is_not_stored_alone(driven) -> None:
    stored = {json.loads(line)["prompt"] for line in (driven / "stored").read_text().splitlines()}
    asked = [row for file in (driven / "asked").iterdir() for row in json.loads(file.read_text())]
    assert stored
    assert len(asked) == len(set(asked))
    assert not stored & set(asked)
    assert stored | set(asked) == set(range(len(stored) + len(asked)))
    assert not (driven / "spoken.unfinished").exists()


@needs_ray
def test_a_pass_over_plain_text_on_ray_is_that_of_one_process(driven, world, tmp_path) -> None:
    peft_graft.transfer(driven / "first", world / "narrow", text=world / "text.txt", config=PLAIN, out=tmp_path / "a")
    mine, theirs = tensors(tmp_path / "a"), tensors(driven / "plain")
    for name, value in mine.items():
        assert (theirs[name] - value).norm() < 1e-4 * value.norm(), name
    one, other = told(tmp_path / "a"), told(driven / "plain")
    assert one["pairing"] == other["pairing"], "what judges is left out by every worker"
    assert one["identity"] == other["identity"]


@needs_ray
def test_a_shelf_on_ray_is_that_of_one_process(driven, world, tmp_path, monkeypatch) -> None:
    report = ShelfReport.model_validate_json((driven / "report").read_text())
    found = {one.name: one for one in report.modules}
    assert list(found) == SHELVED
    assert [one.state for one in found.values()] == ["written", "failed", "failed", "written"]
    assert "something else is there" in found["taken"].error, "a failure on a worker"
    assert str(driven / "broken") in found["broken"].error
    assert (driven / "lost-module").exists()
    monkeypatch.chdir(world)
    for name in ("first", "second"):
        peft_graft.transfer(driven / name, "narrow", text=world / "text.txt", config=PLAIN, out=tmp_path / name)
        mine, theirs = tensors(tmp_path / name), tensors(driven / "shelf" / name)
        assert all(theirs[key].equal(value) for key, value in mine.items())
        assert told(tmp_path / name) == told(driven / "shelf" / name)


@needs_ray
def test_finished_grafts_of_a_shelf_on_ray_are_kept(driven) -> None:
    again = ShelfReport.model_validate_json((driven / "again").read_text())
    assert [one.state for one in again.modules] == ["kept", "failed", "failed", "kept"]
    assert ShelfReport.model_validate_json((driven / "shelf" / SHELF).read_text()) == again
    assert (driven / "shelf" / "report.html").exists()


def on_small_nodes(found: Path) -> None:
    """The room that there is for tasks on two nodes of two processors each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    with pytest.raises(
        PlanError, match="no node has the resources of a cell; expected 3 CPUs and 0 GPUs, found 2 CPUs"
    ):
        Tasks(cluster.address, fail, of="cell", cpus=3)
    found.write_text(json.dumps([Tasks(cluster.address, fail, of="cell", cpus=cpus).slots for cpus in (2, 1, 0.5)]))
    ray.shutdown()
    cluster.shutdown()


@needs_ray
def test_a_task_has_to_fit_on_one_node(tmp_path: Path) -> None:
    driver = processes.start(on_small_nodes, tmp_path / "found", out=tmp_path / "out", err=tmp_path / "err")
    driver.join(200)
    assert driver.exitcode == 0, (tmp_path / "err").read_text()[-3000:]
    assert json.loads((tmp_path / "found").read_text()) == [2, 4, 8]


@needs_ray
def test_an_error_names_what_ray_lacks_or_what_a_task_says(driven) -> None:
    nowhere, no_room, of_task, died, ended = json.loads((driven / "refused").read_text())
    assert nowhere.startswith("--ray nowhere: no cluster of Ray can be reached; expected local for this machine")
    assert no_room.startswith("--ray local: no node has the resources of a shard; expected 1 CPUs and 64 GPUs, found ")
    assert of_task == "1: no task can do this"
    assert died.startswith("--ray local: 5 workers have died over the same shard, of too little memory most likely; ")
    assert "Fix: give tasks more memory" in died
    assert ended == ["0 --ray local: 5 wor", None], "the other call has its result"


def test_what_ray_cannot_take_is_refused(speakers, world, tmp_path, monkeypatch) -> None:
    plain = {"ray": "local", "method": "ridge"}

    def refused(adapter: Path, student: object, config: dict[str, object], **more: object) -> str:
        with pytest.raises(PlanError) as caught:
            peft_graft.transfer(adapter, student, config=config, out=tmp_path / "graft", **more)
        return str(caught.value)

    live = transformers.AutoModelForCausalLM.from_pretrained(speakers / "teacher")
    assert refused(
        speakers / "module", speakers / "stranger", SPOKEN.model_dump() | {"ray": "local"},
        teacher=live, text=speakers / "prompts.jsonl",
    ) == (
        "teacher: processes on Ray load the models for themselves; expected a folder or a hub id, found a live "
        "LlamaForCausalLM. Fix: save it and name the folder, or leave --ray out"
    )  # fmt: skip
    assert refused(world / "lora", world / "narrow", plain, text=tiny.sentences(200)) == (
        "text: processes on Ray read the text for themselves; expected a file or a hub data set, found list. "
        "Fix: write it to a file"
    )
    assert refused(world / "lora", world / "shallow", plain | {"method": "copy"}) == (
        "--ray local: there is nothing to share out on Ray; expected prompts for a language model, or text to align "
        "the models on. Fix: leave --ray out"
    )
    with pytest.raises(PlanError, match="--shards: each module of a shelf goes to a worker as a whole; found 2"):
        peft_graft.transfer_all(["a", "b"], "student", out=tmp_path / "shelf", config={"ray": "local", "shards": 2})
    with pytest.raises(PlanError, match="student: processes on Ray load the models for themselves"):
        peft_graft.transfer_all(["a", "b"], live, out=tmp_path / "shelf", config={"ray": "local"})
    monkeypatch.setattr(Processes, "started", lambda: Processes(0, 2))
    assert refused(world / "lora", world / "narrow", plain, text=world / "text.txt") == (
        "--ray local: work is shared out by Ray or among processes of torchrun, not by both; expected one process, "
        "found 2 of them. Fix: start one, or leave --ray out"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_worker_sees_its_own_gpus_from_0() -> None:
    def seen(device: str, student: str | None) -> tuple[str, str | None]:
        found = on_worker(GraftConfig(device=device, student_device=student))
        return found.device, found.student_device

    assert seen("cuda", None) == ("cuda", None)
    assert seen("cuda:2", None) == ("cuda:0", None)
    assert seen("cuda:3", "cuda:1") == ("cuda:1", "cuda:0")
    assert seen("cpu", "cuda:1") == ("cpu", "cuda:0")
    assert seen("cpu", None) == ("cpu", None)
