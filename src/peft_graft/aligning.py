"""Aligning two models: streamed over text once, checked, solved, reused for every module of the pair."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peft_graft.alignment import Alignment, Pair, copy_alignment, solve_alignment
from peft_graft.alignment_files import save_alignment
from peft_graft.architectures import Architecture
from peft_graft.collecting import CollectionSettings, Wanted, check_pairs, collect
from peft_graft.errors import AlignmentError, PairingError, PlanError
from peft_graft.methods import METHODS, Method
from peft_graft.models import ModelHandle, check_tokenizer, describe_config, load_config, load_model
from peft_graft.modules import TOKENS_OUT, Module
from peft_graft.planning import map_axis, plan_alignment
from peft_graft.preflight import no_text
from peft_graft.report import hardware, versions
from peft_graft.settings import Clock, Progress, TransferSettings, checked_settings
from peft_graft.text import Sample, read_text
from peft_graft.token_pairing import PairingCounts
from peft_graft.weights import check_output

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
    max_tokens: int = 50_000,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Alignment:
    """Align two models once, for every module that will move between them.

    Args:
        sites: roles to cover, such as ``("attn.query", "attn.value")``, ``adapter`` for bottleneck adapters; all by
            default. The other arguments are those of ``transfer``.

    Raises:
        GraftError: as for ``transfer``.
    """
    settings = checked_settings(layers, method, "auto", max_tokens, seed, device, dtype)
    chosen = METHODS[method]
    if not chosen.needs_text:
        raise PlanError(f"{method} needs no alignment", where="--method", fix="call transfer without one")
    if chosen.fits_shifts:
        raise PlanError(f"{method} has no maps of its own", where="--method", fix="align with prune-align")
    if out is not None:
        check_output(Path(out), force=force)
    shapes = [
        describe_config(load_config(str(name), role)) for name, role in ((teacher, "teacher"), (student, "student"))
    ]
    pairs = plan_alignment(shapes[0], shapes[1], layers=layers, roles=sites)
    directions = directions_of_roles(shapes[1], sites)
    samples = peeked(read_text(text, columns, seed))
    clock = Clock(progress)
    with clock("loading models"):
        first = load_model(str(teacher), device=device, dtype=dtype, role="teacher", tokenizer=True)
        second = load_model(str(student), device=device, dtype=dtype, role="student", tokenizer=True)
    (found,), _ = align_handles(
        first, second, samples, pairs, [chosen], settings, clock, str(text), directions=directions, lenient=True
    )
    if out is not None:
        save_alignment(found, Path(out), force=force)
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


def align_handles(
    teacher: ModelHandle,
    student: ModelHandle,
    samples: Iterator[Sample],
    pairs: Mapping[Pair, tuple[int, int]],
    methods: Sequence[Method],
    settings: TransferSettings,
    clock: Clock,
    text: str,
    *,
    directions: Directions | None = None,
    lenient: bool = False,
) -> tuple[list[Alignment], PairingCounts]:
    """Stream once, check, and solve with every method.

    Args:
        directions: which maps of a space are needed; both, of every space, when None.
        lenient: leave out spaces of samples that too few samples were seen for.
    """
    check_tokenizers(teacher, student)
    with clock("pairing tokens"):
        statistics, counts = collect(
            teacher,
            student,
            samples,
            _wanted(pairs, methods, directions or {}),
            CollectionSettings(max_tokens=settings.max_tokens),
            clock.progress,
            hold_out=any(method.holds_out for method in methods),
        )
    if counts.nonfinite_pairs * 2 > counts.pairs:
        raise PairingError(
            "most activations are not finite", where=f"--dtype {settings.dtype}", fix="use --dtype float32 or bfloat16"
        )
    if lenient:
        few = [
            pair
            for pair, (fit, held_out) in statistics.items()
            if pair[0].layer < 0 and fit.count + held_out.count < max(pairs[pair])
        ]
        statistics = {pair: moments for pair, moments in statistics.items() if pair not in few}
    check_pairs(statistics)
    details = {
        "teacher": teacher.name,
        "student": student.name,
        "text": text,
        "settings": settings.model_dump(mode="json"),
        "pairing": asdict(counts),
        "versions": versions(),
        "hardware": hardware(settings.device),
    }
    with clock("solving alignments"):
        found = [
            solve_alignment(method, statistics, teacher.fingerprint, student.fingerprint, details) for method in methods
        ]
    return found, counts


def _wanted(pairs: Iterable[Pair], methods: Sequence[Method], directions: Directions) -> Wanted:
    """What the methods need of every pair of spaces beside the cross moment."""
    return {
        pair: sorted({
            moment for method in methods for moment in method.moments_for(directions.get(pair[1].name, BOTH))
        })
        for pair in pairs
    }  # fmt: skip


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
    ) -> None:
        self.directions = directions
        self.teacher, self.student, self.pairs, self.methods = teacher, student, pairs, methods
        self.samples, self.settings, self.clock, self.text = samples, settings, clock, text
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
                wanted = [one for one in self.methods if one.needs_text]
                found, self.counts = align_handles(
                    self.teacher, self.student, self.samples, self.pairs, wanted, self.settings, self.clock,
                    self.text or "", directions=self.directions,
                )  # fmt: skip
                self._made.update({alignment.method: alignment for alignment in found})
        return self._made[method.name]


def peeked(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The same samples, the first already read, so that a bad source fails before models are loaded."""
    first = next(samples)

    def chained() -> Iterator[Sample]:
        yield first
        yield from samples

    return chained()
