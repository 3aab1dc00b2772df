"""The shared pass: what it gives is what a straightforward one gives, in one piece, in parts and after a break."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence

import pytest
import torch

import tiny
from peft_graft.alignment.activations import Capture, pad, tokenize
from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.collect import (
    CollectionSettings,
    Shard,
    Unfinished,
    collect,
    collect_totals,
    empty_totals,
)
from peft_graft.alignment.layout import Layout
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import pair_tokens
from peft_graft.errors import AlignmentError
from peft_graft.models.loading import ModelPair, load_model
from peft_graft.models.spaces import FIRST_OUT, TOKENS_OUT, Space
from peft_graft.run import Run

ALL = ("cross", "teacher", "student")
SETTINGS = CollectionSettings(max_tokens=500, batch_tokens=100)


def samples(count: int = 300) -> list[Sample]:
    lines = tiny.sentences(count, seed=11)
    return [Sample(line, lines[-index]) if index % 5 == 3 else Sample(line) for index, line in enumerate(lines)]


@pytest.fixture(scope="module")
def models(world):
    return ModelPair(
        load_model(str(world / "teacher"), tokenizer=True),
        load_model(str(world / "narrow"), tokenizer=True),
    )


def pairs_of(models, names: Sequence[str], layers=((0, 0), (1, 1), (2, 1))) -> list[Pair]:
    inner = [(Space(first, name), Space(second, name)) for name in names for first, second in layers]
    return [*inner, *((Space(-1, name),) * 2 for name in (TOKENS_OUT, FIRST_OUT))]


def straightforward(models, text, pairs, settings) -> dict[Pair, PairedStatistics]:
    """All activations of all samples kept, one sample at a time, every statistic by itself in float64."""
    teacher, student = models.teacher, models.student
    kept: dict[Pair, list[list[torch.Tensor]]] = {pair: [[], []] for pair in pairs}
    count = 0
    with (
        torch.inference_mode(),
        Capture(teacher, [pair[0] for pair in pairs]) as first,
        Capture(student, [pair[1] for pair in pairs]) as second,
    ):
        for sample in text:
            if count >= settings.max_tokens:
                break
            (rows_t, spans_t), (rows_s, spans_s) = (
                tokenize(model, [sample], settings.max_length) for model in (teacher, student)
            )
            blocks = pair_tokens(spans_t[0], spans_s[0])
            count += len(blocks)
            held = [capture.forward(pad(capture.model, rows, torch.device("cpu")))
                    for capture, rows in ((first, rows_t), (second, rows_s))]  # fmt: skip
            for pair, sides in kept.items():
                for side, space in enumerate(pair):
                    value = held[side][space][0].double()
                    if space.name == FIRST_OUT:
                        sides[side].append(value.unsqueeze(0))
                    else:
                        ends = [(block.teacher_start, block.teacher_end) if side == 0
                                else (block.student_start, block.student_end) for block in blocks]  # fmt: skip
                        sides[side].extend(value[start:end].mean(0, keepdim=True) for start, end in ends)
    return {pair: PairedStatistics.of(torch.cat(sides[0]), torch.cat(sides[1]), ALL) for pair, sides in kept.items()}


def assert_close(one: PairedStatistics, other: PairedStatistics, tolerance: float) -> None:
    assert one.count == other.count
    for name, value in one.__dict__.items():
        if isinstance(value, torch.Tensor) and getattr(other, name) is not None:
            scale = float(value.abs().max())
            torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=tolerance * scale)


NAMES = ("attn.in", "attn.query.out", "ffn.mid", "layer.out")


@pytest.fixture(scope="module")
def expected(models) -> dict[Pair, PairedStatistics]:
    """What a straightforward pass gives."""
    return straightforward(models, samples(), pairs_of(models, NAMES), SETTINGS)


@pytest.fixture(scope="module")
def split(models):
    """What one undisturbed pass gives, some batches held out, and its counts."""
    return collect(models, samples(), dict.fromkeys(pairs_of(models, NAMES), ALL), SETTINGS, hold_out=True)


@pytest.mark.parametrize("moments", [("cross",), ALL])
def test_the_shared_pass_gives_what_a_straightforward_one_gives(models, expected, moments) -> None:
    pairs = pairs_of(models, NAMES)
    found, counts = collect(models, samples(), dict.fromkeys(pairs, moments), SETTINGS)
    assert counts.pairs >= SETTINGS.max_tokens
    assert found.keys() == expected.keys()
    for pair in pairs:
        assert_close(expected[pair], found[pair][0], 1e-5)
        assert found[pair][1].count == 0


def test_held_out_batches_and_the_others_are_all(models, split) -> None:
    pairs = pairs_of(models, NAMES)
    expected, _ = collect(models, samples(), dict.fromkeys(pairs, ALL), SETTINGS)
    for pair in pairs:
        fit, held_out = split[0][pair]
        assert 0 < held_out.count < fit.count
        assert_close(expected[pair][0], fit.merge(held_out), 1e-6)


def test_spaces_that_are_one_tensor_share_their_moments(models) -> None:
    pairs = [*pairs_of(models, ["attn.in", "layer.out"], [(0, 0), (1, 1)]),
             (Space(3, "layer.out"), Space(1, "layer.out"))]  # fmt: skip
    found, _ = collect(models, samples(), dict.fromkeys(pairs, ALL), SETTINGS)
    out, following = (Space(0, "layer.out"),) * 2, (Space(1, "attn.in"),) * 2
    assert found[out] is found[following], "the output of a layer is the input of the next"
    last, tokens = (Space(3, "layer.out"), Space(1, "layer.out")), (Space(-1, TOKENS_OUT),) * 2
    assert found[last] is found[tokens]
    assert found[out][0].teacher_moment is not found[last][0].teacher_moment


def test_only_what_is_wanted_is_kept(models) -> None:
    reads, writes = (Space(0, "attn.in"),) * 2, (Space(0, "attn.query.out"),) * 2
    found, _ = collect(models, samples(), {reads: ["student"], writes: ["teacher"]}, SETTINGS)
    assert found[reads][0].teacher_moment is None
    assert found[reads][0].student_moment is not None
    assert found[writes][0].teacher_moment is not None
    assert found[writes][0].student_moment is None


def test_layers_past_the_last_needed_one_are_not_computed(models) -> None:
    teacher = models.teacher
    ran = [0, 0]
    hooks = [teacher.base.encoder.layer[index].register_forward_hook(lambda *_, at=at: ran.__setitem__(at, ran[at] + 1))
             for at, index in enumerate((1, 2))]  # fmt: skip
    pair = (Space(1, "attn.value.out"), Space(0, "attn.value.out"))
    found, _ = collect(models, samples(), {pair: []}, SETTINGS)
    for hook in hooks:
        hook.remove()
    assert ran == [2, 2], "once for each of the probes"
    expected = straightforward(models, samples(), [pair], SETTINGS)
    assert_close(expected[pair], found[pair][0], 1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_merged_parts_are_the_whole(models, split, count: int) -> None:
    pairs = dict.fromkeys(pairs_of(models, NAMES), ALL)
    expected, counts = split
    whole = empty_totals(models, pairs, hold_out=True)
    for index in range(count):
        part, of_part = collect_totals(models, samples(), pairs, SETTINGS, hold_out=True, shard=Shard(index, count))
        again = empty_totals(models, pairs, hold_out=True)
        again.load(part.tensors())
        whole.merge(again)
        assert of_part == counts
    for pair, moments in whole.statistics().items():
        for one, other in zip(expected[pair], moments, strict=True):
            assert_close(one, other, 1e-6)


def test_an_interrupted_pass_goes_on_where_it_was(models, split, tmp_path, monkeypatch) -> None:
    import peft_graft.alignment.collect as collecting

    monkeypatch.setattr(collecting, "SAVE_EVERY", 0.0)
    pairs = dict.fromkeys(pairs_of(models, NAMES), ALL)
    expected, counts = split

    class BreakError(Exception):
        pass

    calls = itertools.count()

    def stop(*_: object) -> None:
        if next(calls) == 3:
            raise BreakError

    state = Unfinished(tmp_path / "out.unfinished", "this pass")
    with pytest.raises(BreakError):
        collect_totals(
            models, samples(), pairs, SETTINGS, Run([tiny.OnProgress(stop)]), hold_out=True, unfinished=state
        )
    ran = []
    hook = models.teacher.base.register_forward_pre_hook(lambda *_: ran.append(1))
    totals, again = collect_totals(models, samples(), pairs, SETTINGS, hold_out=True, unfinished=state)
    rest = len(ran)
    ran.clear()
    other = Unfinished(tmp_path / "out.unfinished", "another pass")
    collect_totals(models, samples(), pairs, SETTINGS, hold_out=True, unfinished=other)
    hook.remove()
    assert rest == len(ran) - 4, "the batches before the break were not run again"
    assert again == counts
    for pair, moments in totals.statistics().items():
        for one, resumed in zip(expected[pair], moments, strict=True):
            assert_close(one, resumed, 1e-6)


def test_progress_counts_to_what_a_short_text_has(models) -> None:
    told: list[tuple[int, int]] = []
    run = Run([tiny.OnProgress(lambda _, done, total: told.append((done, total)))])
    for known in (600, None):
        told.clear()
        settings = CollectionSettings(max_tokens=100_000, samples=known)
        _, counts = collect(models, samples(600), {(Space(0, "attn.in"),) * 2: []}, settings, run)
        assert told[-1] == (counts.pairs, counts.pairs)
        assert 0 < told[0][0] < counts.pairs / 10, "batch by batch"
        assert told[0][1] == (pytest.approx(counts.pairs, rel=0.1) if known else 100_000)


def test_activations_that_are_not_finite_are_left_out(models) -> None:
    teacher = models.teacher
    pair = (Space(0, "ffn.up.out"),) * 2
    linear = teacher.base.encoder.layer[0].intermediate.dense
    hook = linear.register_forward_hook(lambda _, __, out: out.index_fill(1, torch.tensor([2]), float("inf")))
    try:
        found, counts = collect(models, samples(), {pair: []}, SETTINGS)
    finally:
        hook.remove()
    assert counts.nonfinite_pairs > 0
    assert found[pair][0].count == counts.pairs - counts.nonfinite_pairs
    assert bool(torch.isfinite(found[pair][0].cross).all())


def test_statistics_that_do_not_fit_are_refused_before_the_pass(models, monkeypatch) -> None:
    little = namedtuple("Memory", "available")(4000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: little)
    pairs = pairs_of(models, ["attn.in"])
    with pytest.raises(AlignmentError, match="do not fit in memory") as caught:
        collect(models, samples(), dict.fromkeys(pairs, ALL), SETTINGS)
    assert "--method" in str(caught.value)


def test_passes_take_neighbouring_layers_together_and_share_tensors(models) -> None:
    names = ["attn.in", "attn.query.out", "ffn.mid"]
    wanted = dict.fromkeys(pairs_of(models, names), ALL)
    found = Layout.of(models, wanted)
    assert found.parts(wanted, 10**9, hold_out=True) == [wanted]
    room = found.values(wanted, hold_out=True) // 2
    parts = found.parts(wanted, room, hold_out=True)
    assert len(parts) > 1
    assert all(found.values(part, hold_out=True) <= room for part in parts)
    assert sorted(pair for part in parts for pair in part) == sorted(wanted)
    layers = [[pair[1].layer for pair in part] for part in parts]
    assert layers[0][0] == 0
    assert layers[-1][-1] == -1, "what needs the whole model comes last"
