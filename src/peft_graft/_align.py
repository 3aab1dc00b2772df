"""Aligning two models: streamed over text once, checked, solved, reused for every module of the pair."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice, tee
from pathlib import Path

from peft_graft.alignment.alignment import Alignment, Pair, copy_alignment, solve_alignment
from peft_graft.alignment.cache import AlignmentCache, cache_folder
from peft_graft.alignment.collect import (
    WHOLE,
    CollectionSettings,
    Shard,
    Totals,
    Unfinished,
    check_pairs,
    collect_totals,
)
from peft_graft.alignment.layout import Layout, Wanted, room_of_a_pass
from peft_graft.alignment.methods import METHODS, Method, map_axis
from peft_graft.alignment.moments import Moment
from peft_graft.alignment.sharding import RayShards, collect_on_ray, least_of_all, this_process, wait_for_others
from peft_graft.alignment.storage import load_alignment, save_alignment
from peft_graft.alignment.text import Sample, read_text
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.environment import hardware, versions
from peft_graft.errors import AlignmentError, PairingError, PlanError
from peft_graft.files import check_output
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import Loading, ModelHandle, check_tokenizer, describe_config, load_config, load_model
from peft_graft.models.spaces import TOKENS_OUT
from peft_graft.modules.base import Module
from peft_graft.options import MAX_TOKENS, UNFINISHED, Progress
from peft_graft.planning.checks import no_text
from peft_graft.planning.experts import SAMPLES, match_experts
from peft_graft.planning.plan import expert_pairs, plan_alignment
from peft_graft.settings import Clock, TransferSettings, checked_settings

#: Which maps of a space, by its name, are needed: ``read``, or what writes or scales; both where nothing is said.
Directions = Mapping[str, Collection[str]]
BOTH = ("read", "write")


def align(
    teacher: str | Path,
    student: str | Path,
    *,
    text: str | Path,
    out: str | Path | None = None,
    columns: Sequence[str] | None = None,
    layers: str = "skip",
    method: str = "prune-align",
    sites: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    device: str = "cpu",
    student_device: str | None = None,
    dtype: str = "float32",
    ray: str | None = None,
    shards: int | None = None,
    cache: bool | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Alignment:
    """Align two models once, for every module that will move between them.

    Among the processes of torchrun or accelerate each runs its share of the text, all return the same, and the first
    writes. An interrupted pass goes on when the same is asked for again with the same ``out``.

    Args:
        sites: roles to cover, such as ``("attn.query", "attn.value")``, ``adapter`` for bottleneck adapters; all by
            default.
        ray: run the pass on Ray, by a cluster's address or ``local``, in as many parts as ``shards`` says (by default
            one for each CPU). The other arguments are those of ``transfer``.

    Raises:
        GraftError: as for ``transfer``.
    """
    settings = checked_settings(layers, method, "auto", max_tokens, seed, device, dtype, student_device=student_device)
    chosen = METHODS[method]
    if not chosen.needs_text:
        raise PlanError(f"{method} needs no alignment", where="--method", fix="call transfer without one")
    if chosen.fits_shifts:
        raise PlanError(f"{method} has no maps of its own", where="--method", fix="align with prune-align")
    if out is not None:
        check_output(Path(out), force=force)
    shapes = [
        describe_config(load_config(str(name), role=role))
        for name, role in ((teacher, "teacher"), (student, "student"))
    ]
    pairs = plan_alignment(shapes[0], shapes[1], layers=layers, roles=sites)
    directions = directions_of_roles(shapes[0], sites)
    if shards is not None and (shards < 1 or ray is None):
        raise PlanError("shards are parts of a pass on Ray, one at least", where="--shards", found=shards,
                        fix="say --ray local, or start several processes with torchrun")  # fmt: skip
    samples = peeked(read_text(text, columns, seed))
    clock = Clock(progress)
    shard = this_process()
    with clock("loading models"):
        first = load_model(str(teacher), Loading(device=device, dtype=dtype), role="teacher", tokenizer=True)
        own = Loading(device=student_device or device, dtype=dtype)
        second = load_model(str(student), own, role="student", tokenizer=True)
    if expert_pairs(shapes[0], shapes[1], layers):
        start = list(islice(samples, SAMPLES))
        experts = match_experts(first, second, start, layers)
        pairs = plan_alignment(shapes[0], shapes[1], layers=layers, roles=sites, experts=experts)
        samples = chain(start, samples)
    work = Path(f"{out}{UNFINISHED}") if out is not None else None
    on_ray = None
    if ray is not None:
        on_ray = RayShards(ray, shards or os.cpu_count() or 1, str(teacher), str(student), str(text), columns, seed,
                           device, student_device or device, dtype)  # fmt: skip
    aligner = Aligner(
        first, second, pairs, [chosen], samples, None, settings, clock, str(text), directions, lenient=True, work=work,
        cache=AlignmentCache.of(cache_folder(cache), text, columns, seed), shard=shard, on_ray=on_ray,
    )  # fmt: skip
    found = aligner.alignment(chosen)
    if out is not None and shard.index == 0:
        save_alignment(found, Path(out), force=force)
        shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    wait_for_others(shard)
    return found


def check_alignment(alignment: Alignment, teacher: ModelHandle, student: ModelHandle) -> None:
    """Refuse an alignment of other models.

    Raises:
        AlignmentError: a fingerprint differs.
    """
    for role, model, expected in (("teacher", teacher, alignment.teacher), ("student", student, alignment.student)):
        if model.fingerprint != expected:
            raise AlignmentError(
                f"the alignment was made for another {role}",
                where=model.name,
                expected=f"weights with fingerprint {expected[:12]}",
                found=model.fingerprint[:12],
                fix="make one for these models with `peft-graft align`",
            )


def directions_of_modules(modules: Iterable[Module], method: Method, *, head: str | None, shifts: bool) -> Directions:
    """Which maps moving these modules needs.

    Args:
        head: the space that a head reads, if one is carried. shifts: whether shifts of the last hidden state are moved.
    """
    found: dict[str, set[str]] = {}
    for module in modules:
        for tensor in module.tensors.values():
            for axis in tensor.axes:
                if axis is not None:
                    found.setdefault(map_axis(method, module, axis), set()).add(axis.direction)
    if head:
        found.setdefault(head, set()).add("read")
    if shifts:
        found.setdefault(TOKENS_OUT, set()).add("write")
    return found


def directions_of_roles(architecture: Architecture, roles: Sequence[str] | None) -> Directions:
    """Which maps any module at these linear roles needs; both for what adapters see, and for all when None."""
    if roles is None or "adapter" in roles:
        return {}
    found: dict[str, set[str]] = {}
    for role in roles:
        if linear := architecture.row.linears.get(role):
            found.setdefault(linear.reads, set()).add("read")
            found.setdefault(linear.writes, set()).add("write")
    return found


def check_tokenizers(teacher: ModelHandle, student: ModelHandle) -> None:
    """Refuse models whose text cannot be paired.

    Raises:
        PairingError: one came without its tokenizer. ModelError: a tokenizer is slow.
    """
    for model, role in ((teacher, "teacher"), (student, "student")):
        if model.tokenizer is None:
            raise PairingError("the model came without its tokenizer", where=role, fix="pass its fast tokenizer")
        check_tokenizer(model.tokenizer, model.name, role)


class Aligner:
    """The alignments that the methods of one transfer need, made when they are first asked for.

    All methods that need text share one pass over it.

    Args:
        pairs: of spaces, with their sizes. given: an alignment to use instead of text.
        text: what the samples are, for the record. directions: which maps of a space are needed; both when None.
        lenient: leave out spaces of samples that too few samples were seen for.
        work: a folder for the state of an interrupted pass. cache: where alignments of this text are kept.
        shard: the part of the batches that is this process's. on_ray: run the pass there.
    """

    def __init__(
        self,
        teacher: ModelHandle,
        student: ModelHandle,
        pairs: Mapping[Pair, tuple[int, int]],
        methods: Sequence[Method],
        samples: Iterator[Sample] | None,
        given: Alignment | None,
        settings: TransferSettings,
        clock: Clock,
        text: str | None,
        directions: Directions | None = None,
        *,
        lenient: bool = False,
        work: Path | None = None,
        cache: AlignmentCache | None = None,
        shard: Shard = WHOLE,
        on_ray: RayShards | None = None,
    ) -> None:
        self.teacher, self.student, self.pairs, self.methods = teacher, student, pairs, methods
        self.samples, self.settings, self.clock, self.text = samples, settings, clock, text
        self.directions, self.lenient, self.work, self.cache = directions or {}, lenient, work, cache
        self.shard, self.on_ray = shard, on_ray
        self.counts: PairingCounts | None = None
        self._made: dict[str, Alignment] = {}
        if given is not None:
            check_alignment(given, teacher, student)
            self._made[given.method] = given

    def alignment(self, method: Method) -> Alignment:
        """The alignment of one of the methods.

        Raises:
            TextError: it needs text, and there is none.
        """
        if method.name not in self._made:
            if not method.needs_text:
                self._made[method.name] = copy_alignment(self.pairs, self.teacher.fingerprint, self.student.fingerprint)
            else:
                if self.samples is None:
                    raise no_text(method.name)
                methods = [one for one in self.methods if one.needs_text]
                found = self._kept(methods) or self._solved(methods)
                self.counts = PairingCounts(**found[0].details["pairing"])
                self._made.update({alignment.method: alignment for alignment in found})
        return self._made[method.name]

    def _wanted(self, methods: Sequence[Method]) -> dict[Pair, list[Moment]]:
        """What the methods need of every pair of spaces beside the cross moment."""
        return {
            pair: sorted({
                moment for method in methods for moment in method.moments_for(self.directions.get(pair[0].name, BOTH))
            })
            for pair in self.pairs
        }  # fmt: skip

    def _kept(self, methods: Sequence[Method]) -> list[Alignment]:
        """The alignments by these methods from the cache, none where one is lacking."""
        if self.cache is None:
            return []
        models, settings = (self.teacher.fingerprint, self.student.fingerprint), self.settings.model_dump(mode="json")
        found = [self.cache.find(method, *models, settings, self._wanted([method])) for method in methods]
        return [one for one in found if one] if all(found) else []

    def _solved(self, methods: Sequence[Method]) -> list[Alignment]:
        """Stream, check, and solve with every method: in one pass, or in as many as their statistics need to fit."""
        check_tokenizers(self.teacher, self.student)
        parts = self._parts(methods)
        solved = [self._part(methods, part, last=part is parts[-1]) for part in parts]
        found = [
            replace(
                of_method[0],
                maps={pair: one for alignment in of_method for pair, one in alignment.maps.items()},
                diagnostics={pair: one for alignment in of_method for pair, one in alignment.diagnostics.items()},
            )
            for of_method in zip(*solved, strict=True)
        ]
        if self.cache is not None and self.shard.index == 0:
            for alignment in found:
                self.cache.keep(alignment, self.settings.model_dump(mode="json"))
        return found

    def _parts(self, methods: Sequence[Method]) -> list[Wanted]:
        """What the methods need, in as many parts as memory asks for; the same in every process."""
        wanted, hold_out = self._wanted(methods), _hold_out(methods)
        sharers = self.on_ray.shards if self.on_ray else 1
        room = least_of_all(room_of_a_pass(self.teacher.device, sharers), self.shard)
        return Layout.of(self.teacher, self.student, wanted).parts(wanted, room, hold_out=hold_out)

    def _part(self, methods: Sequence[Method], wanted: Wanted, *, last: bool) -> list[Alignment]:
        """The alignments of a part of the spaces, by every method, from one pass over the text.

        Those of a part that others follow are kept until all are there, so that a pass is not repeated.
        """
        key = self._key(methods, wanted)
        kept: list[Path] = []
        if self.work is not None and self.shard.count == 1 and not last:
            kept = [self.work / f"{key[:16]}-{method.name}" for method in methods]
            if all(folder.is_dir() for folder in kept):
                return [load_alignment(folder) for folder in kept]
        settings = self.settings.model_dump(mode="json")
        with self.clock("pairing tokens"):
            totals, counts = self._totals(key, wanted, hold_out=_hold_out(methods), last=last)
            statistics = totals.statistics()
        if counts.nonfinite_pairs * 2 > counts.pairs:
            raise PairingError(
                "most activations are not finite",
                where=f"--dtype {self.settings.dtype}",
                fix="use --dtype float32 or bfloat16",
            )
        if self.lenient:
            few = [
                pair
                for pair, (fit, held_out) in statistics.items()
                if pair[0].layer < 0 and fit.count + held_out.count < max(self.pairs[pair])
            ]
            statistics = {pair: moments for pair, moments in statistics.items() if pair not in few}
        check_pairs(statistics)
        details = {
            "teacher": self.teacher.name,
            "student": self.student.name,
            "text": self.text or "",
            "settings": settings,
            "pairing": asdict(counts),
            "versions": versions(),
            "hardware": hardware(self.settings.device),
        }
        models = self.teacher.fingerprint, self.student.fingerprint
        with self.clock("solving alignments"):
            found = [solve_alignment(method, statistics, *models, details) for method in methods]
        for alignment, folder in zip(found, kept, strict=False):
            save_alignment(alignment, folder, force=True)
        return found

    def _key(self, methods: Sequence[Method], wanted: Wanted) -> str:
        """What tells a pass from all others."""
        models = self.teacher.fingerprint, self.student.fingerprint
        parts = [*models, self.settings, _stamp(self.text), wanted, _hold_out(methods)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _totals(self, key: str, wanted: Wanted, *, hold_out: bool, last: bool) -> tuple[Totals, PairingCounts]:
        assert self.samples is not None
        samples = self.samples
        if not last:  # the next pass goes over the same text
            samples, self.samples = tee(samples)
        settings = CollectionSettings(max_tokens=self.settings.max_tokens)
        state = Unfinished(self.work, key) if self.work else None
        if self.on_ray:
            return collect_on_ray(
                self.on_ray, self.teacher, self.student, wanted, settings, self.clock.progress, hold_out=hold_out,
                unfinished=state,
            )  # fmt: skip
        totals, counts = collect_totals(
            self.teacher, self.student, samples, wanted, settings, self.clock.progress, hold_out=hold_out,
            shard=self.shard, unfinished=state,
        )  # fmt: skip
        if self.shard.count > 1:
            totals.merge_processes()
            counts.nonfinite_pairs = totals.nonfinite
        return totals, counts


def _hold_out(methods: Sequence[Method]) -> bool:
    """Whether one of the methods chooses by held-out pairs."""
    return any(method.holds_out for method in methods)


def _stamp(text: str | None) -> tuple[object, ...]:
    """A text's name, and what changes with it where it is a file."""
    path = Path(text or "")
    return (text, path.stat().st_size, path.stat().st_mtime_ns) if text and path.is_file() else (text,)


def peeked(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The same samples, the first already read, so that a bad source fails before models are loaded."""
    first = next(samples)

    def chained() -> Iterator[Sample]:
        yield first
        yield from samples

    return chained()
