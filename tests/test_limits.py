"""Machines that are short of something: a cache that takes nothing, no handles left, one thread in place of two."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file

import tiny
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import CheckpointError


def test_a_cache_that_takes_nothing_is_done_without(world, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("PEFT_GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(60)))
    graft = tiny.transfer(
        world / "lora", world / "shallow", text=tmp_path / "text.txt", method="prune-align", polish=0, head="carry"
    )
    assert graft.report.method == "prune-align"
    assert "the alignment is not kept for later" in caplog.text


def test_a_kept_alignment_gives_the_same_graft(world, tmp_path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(300)))
    other = tiny.base_model(tmp_path / "other", seed=5, layers=2, hidden=48)

    def moved(name: str) -> dict[str, torch.Tensor]:
        tiny.transfer(world / "lora", other, text=tmp_path / "text.txt", method="ridge", polish=0, out=tmp_path / name)
        return load_file(tmp_path / name / "adapter_model.safetensors")

    plain = moved("plain")
    monkeypatch.setenv("PEFT_GRAFT_CACHE", str(tmp_path / "cache"))
    for name in ("kept", "found"):
        assert all(plain[key].equal(value) for key, value in moved(name).items()), name
    assert any((tmp_path / "cache").rglob("*.safetensors"))


def test_no_handles_left_is_one_error(world) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    read_checkpoint(world / "lora")  # so that nothing is imported later
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(CheckpointError, match="Too many open files"):
            read_checkpoint(world / "lora")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_change_no_map_but_for_rounding(world, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(60)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                tiny.align(world / "teacher", world / "shallow", text=tmp_path / "text.txt", sites=["attn.value"])
            )
    finally:
        torch.set_num_threads(before)
    first, second = found
    assert first.maps.keys() == second.maps.keys()
    for pair, one in first.maps.items():
        assert torch.equal(one.indices, second.maps[pair].indices), pair
