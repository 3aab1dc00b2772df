"""A pass on several processes gives what one gives; a lost part is done again; kept alignments are used again."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

import processes
import tiny
from peft_graft.alignment import aligner, sharding
from peft_graft.alignment import cache as caching
from peft_graft.alignment import collect as collecting
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.maps import LinearMap
from peft_graft.alignment.methods import METHODS
from peft_graft.errors import PlanError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
SITES = ("attn.query", "attn.value")


def assert_same(one: Alignment, other: Alignment) -> None:
    assert one.maps.keys() == other.maps.keys()
    assert one.details["pairing"] == other.details["pairing"]
    for pair, found in one.maps.items():
        again = other.map(pair)
        if isinstance(found, LinearMap):
            for part in ("reading", "writing", "shift"):
                mine, theirs = getattr(found, part), getattr(again, part)
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    limit = 2e-6 * float(mine.abs().max())
                    torch.testing.assert_close(theirs.double(), mine.double(), rtol=0, atol=limit)
        else:
            assert torch.equal(found.indices, again.indices)
        for name, value in one.diagnostics[pair].items():
            assert other.diagnostics[pair][name] == pytest.approx(value, abs=1e-6, rel=1e-6), (pair, name)


@pytest.fixture(scope="module")
def alone(world) -> Alignment:
    """By the method that needs every kind of moment, and batches held out."""
    return tiny.align(
        world / "teacher", world / "narrow", text=world / "text.txt", method="ridge", sites=SITES, max_tokens=2500
    )


def command(world: Path, out: Path, method: str) -> list[str]:
    return ["align", str(world / "teacher"), str(world / "narrow"), "--text", str(world / "text.txt"), "--out",
            str(out), "--method", method, "--sites", ",".join(SITES), "--max-tokens", "2500", "--json"]  # fmt: skip


def test_four_processes_of_torchrun_give_what_one_gives(world, alone, tmp_path) -> None:
    agent = processes.start(
        processes.torchrun, 4, *command(world, tmp_path / "outputs" / "a", alone.method), out=tmp_path / "out",
        err=tmp_path / "err",
    )  # fmt: skip
    agent.join(300)
    assert agent.exitcode == 0, (tmp_path / "err").read_text()
    assert json.loads((tmp_path / "out").read_text())["method"] == alone.method, "one process speaks"
    assert_same(alone, Alignment.from_pretrained(tmp_path / "outputs" / "a"))
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["a"]


def test_statistics_that_do_not_fit_at_once_are_taken_in_several_passes(world, alone, tmp_path, monkeypatch) -> None:
    passes: list[int] = []
    whole, solve = aligner.collect_totals, aligner.solve_alignment
    monkeypatch.setattr(aligner, "memory_of_a_pass", lambda *_: 1)
    monkeypatch.setattr(aligner, "collect_totals", lambda *a, **k: passes.append(len(a[2])) or whole(*a, **k))

    def again() -> Alignment:
        return tiny.align(
            world / "teacher", world / "narrow", text=world / "text.txt", method=alone.method, sites=SITES,
            max_tokens=2500, out=tmp_path / "a",
        )  # fmt: skip

    def stop_at_the_last(*given: object) -> Alignment:
        if len(passes) == len(alone.maps):
            raise KeyboardInterrupt
        return solve(*given)

    monkeypatch.setattr(aligner, "solve_alignment", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert passes == [1] * len(alone.maps), "every pair of spaces by itself, as nothing fits"
    monkeypatch.setattr(aligner, "solve_alignment", solve)
    assert_same(alone, again())
    assert len(passes) == len(alone.maps) + 1, "what was solved is not streamed again"


def on_ray(marks: Path, *arguments: str) -> None:
    """The command with a worker of Ray that is killed the first time it comes to its part."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[on_ray.__module__])  # workers do not import tests
    os.environ |= {"RAY_worker_niceness": "0"}  # else everything else goes first, the tests beside it too
    whole = sharding.run_part

    def fragile(*given):
        shard = given[-1]
        mark = marks / f"lost-{shard.index}"
        if shard.index == 2 and not mark.exists():
            mark.touch()
            os._exit(1)
        return whole(*given)

    sharding.run_part = fragile
    processes.command(*arguments)


@needs_ray
def test_parts_on_ray_give_what_one_process_gives_and_a_lost_one_is_done_again(world, alone, tmp_path) -> None:
    arguments = [*command(world, tmp_path / "a", alone.method), "--ray", "local", "--shards", "4"]
    driver = processes.start(on_ray, tmp_path, *arguments, out=tmp_path / "out", err=tmp_path / "err")
    driver.join(300)
    assert driver.exitcode == 0, (tmp_path / "out").read_text() + (tmp_path / "err").read_text()
    assert (tmp_path / "lost-2").exists()
    assert_same(alone, Alignment.from_pretrained(tmp_path / "a"))


def test_shards_without_ray_are_refused(world) -> None:
    with pytest.raises(PlanError, match="--ray local"):
        tiny.align(world / "teacher", world / "narrow", text=world / "text.txt", shards=2)


def _forwards(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every pass over the text from now on."""
    passes: list[object] = []
    collect = aligner.collect_totals

    def counted(*args: object, **options: object) -> object:
        passes.append(1)
        return collect(*args, **options)

    monkeypatch.setattr(aligner, "collect_totals", counted)
    return passes


@pytest.mark.parametrize("method", ["prune-align", "ridge"])
def test_a_second_module_of_a_pair_needs_no_pass(world, text, tmp_path, monkeypatch, method: str) -> None:
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path / "cache"))
    passes = _forwards(monkeypatch)
    options = {"student": world / "narrow", "text": text, "method": method, "polish": 0, "head": "carry"}
    first = tiny.transfer(world / "lora", **options)
    second = tiny.transfer(world / "lora", **options)
    assert len(passes) == 1
    assert second.report.pairing == first.report.pairing
    assert second.report.verdict.measured.agreement == pytest.approx(first.report.verdict.measured.agreement, abs=1e-3)
    tiny.transfer(world / "lora", **options, cache=False)
    tiny.transfer(world / "lora", **options, seed=1)
    tiny.transfer(world / "lora", **options, max_tokens=500)
    assert len(passes) == 4, "another order, or number of tokens, is another alignment"
    tiny.align(world / "teacher", world / "narrow", text=text, method=method, sites=["attn.query"])
    assert len(passes) == 5, "an alignment does not leave out what judges a transfer"


def test_alignments_of_other_sites_are_put_together(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path / "cache"))
    passes = _forwards(monkeypatch)

    def align(*sites: str) -> Alignment:
        return tiny.align(
            world / "teacher", world / "narrow", text=world / "text.txt", method="ridge", sites=sites, max_tokens=2000
        )

    align("attn.query")
    align("attn.value")
    both = align("attn.query", "attn.value")
    assert len(passes) == 2
    monkeypatch.delenv(caching.VARIABLE)
    assert_same(align("attn.query", "attn.value"), both)
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path / "cache"))
    align("adapter")
    assert len(passes) == 4, "adapters need both directions of what they see"


def test_a_state_of_other_text_in_memory_is_not_taken_up(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(collecting, "SAVE_EVERY", 0.0)
    options = {"student": world / "narrow", "method": "prune-align", "head": "drop", "polish": 0}

    def moved(text: list[str], **more) -> Alignment:
        return tiny.transfer(world / "lora", **options, text=text, **more).alignment

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "aligning the models" and done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moved(tiny.sentences(150), out=tmp_path / "g", progress=stop)
    assert (tmp_path / "g.unfinished" / "pass-0" / "state.json").is_file()
    second = tiny.sentences(150, seed=1)
    assert_same(moved(second, out=tmp_path / "g"), moved(second))


def test_a_cache_that_cannot_be_written_is_done_without(world, alone, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    cache, keys = caching.AlignmentCache(tmp_path / "file" / "alignments", "key"), ("teacher", "student")
    cache.keep(alone, METHODS["ridge"], keys)
    assert "the alignment is not kept for later: " in caplog.text
    assert cache.find(METHODS["ridge"], keys, {}) is None


def test_maps_of_a_method_from_outside_are_not_kept(alone, tmp_path) -> None:
    cache, keys = caching.AlignmentCache(tmp_path, "key"), ("teacher", "student")
    ridge, wanted = METHODS["ridge"], dict.fromkeys(alone.maps, ())
    outside = replace(ridge, solve=lambda fit, held_out: ridge.solve(fit, held_out))
    cache.keep(alone, outside, keys)
    assert list(tmp_path.iterdir()) == []
    cache.keep(alone, ridge, keys)
    assert_same(alone, cache.find(ridge, keys, wanted))
    assert cache.find(outside, keys, wanted) is None
    assert cache.find(ridge, ("teacher", "another"), wanted) is None


def test_an_alignments_digest_is_that_of_its_files_and_tells_values_apart(alone, tmp_path) -> None:
    alone.save_pretrained(tmp_path / "a")
    assert Alignment.from_pretrained(tmp_path / "a").digest == alone.digest
    pair, found = next(iter(alone.maps.items()))
    other = replace(alone, maps={**alone.maps, pair: replace(found, shift=found.shift + 1)})
    assert other.digest != alone.digest


def test_the_cache_is_bounded_and_may_be_damaged(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(caching.VARIABLE, str(tmp_path / "cache"))
    passes = _forwards(monkeypatch)

    def align(seed: int) -> Alignment:
        return tiny.align(
            world / "teacher", world / "narrow", text=world / "text.txt", sites=SITES, max_tokens=1000, seed=seed
        )

    align(0)
    kept = list((tmp_path / "cache" / "alignments").glob("*/*"))
    assert len(kept) == 1
    (kept[0] / "alignment.safetensors").write_bytes(b"no tensors")
    align(0)
    assert len(passes) == 2
    sizes = [sum(file.stat().st_size for file in folder.iterdir())
             for folder in (tmp_path / "cache" / "alignments").glob("*/*")]  # fmt: skip
    monkeypatch.setattr(caching, "MOST", 2.5 * max(sizes))
    for seed in (1, 2, 3):
        align(seed)
    assert len(list((tmp_path / "cache" / "alignments").glob("*/*"))) == 2
    align(3)
    assert len(passes) == 5, "those used last are kept"
    assert caching.cache_folder(False) is None
    monkeypatch.delenv(caching.VARIABLE)
    assert caching.cache_folder(None) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path))
    assert caching.cache_folder(True) == tmp_path / "peft-graft" / "cache"
