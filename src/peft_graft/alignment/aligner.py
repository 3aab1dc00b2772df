"""The alignments that a run needs: streamed over text once, checked, solved, kept for later modules of the pair."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, tee

from peft_graft.alignment.alignment import Alignment, Pair, copy_alignment, shape_alignment, solve_alignment
from peft_graft.alignment.cache import AlignmentCache, assembled
from peft_graft.alignment.collect import (
    PAIRING,
    CollectionSettings,
    Shard,
    Totals,
    Unfinished,
    check_pairs,
    collect_totals,
)
from peft_graft.alignment.distinct import key_of
from peft_graft.alignment.json_rows import digest_of
from peft_graft.alignment.layout import SAMPLE_SPACES, Layout, Wanted, memory_of_a_pass
from peft_graft.alignment.methods import Method
from peft_graft.alignment.moments import Moment
from peft_graft.alignment.sharding import RayPass, collect_on_ray
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.config import PairConfig
from peft_graft.environment import hardware, versions
from peft_graft.errors import AlignmentError, GraftError, PairingError, TextError
from peft_graft.models.loading import ModelPair, check_tokenizer
from peft_graft.run import Run

#: Which maps of a space, by its name, are needed: ``read``, or what writes or scales; both where nothing is said.
Directions = Mapping[str, Collection[str]]
BOTH = ("read", "write")
#: Samples that tell a text from others where its whole is not known.
_FIRST = 2000


@dataclass(frozen=True)
class WantedMaps:
    """The maps that are asked for.

    Attributes:
        pairs: pairs of spaces, with their (teacher, student) sizes.
        directions: which maps of a space are needed, by its name.
        lenient: leave out spaces with one vector a sample if too few samples were seen for them.
        fits_heads: the head is fitted to the teacher's answers too, and the better one taken: its space may have fewer
            samples than units.
    """

    pairs: Mapping[Pair, tuple[int, int]]
    directions: Directions = field(default_factory=dict)
    lenient: bool = False
    fits_heads: bool = False

    def moments(self, methods: Iterable[Method]) -> dict[Pair, list[Moment]]:
        """What the methods need of every pair of spaces beside the cross moment."""
        methods = list(methods)
        return {
            pair: sorted(
                {moment for method in methods for moment in method.moments_for(self.directions.get(pair[0].name, BOTH))}
            )
            for pair in self.pairs
        }

    def widened(self, other: WantedMaps) -> WantedMaps:
        """These and those of another, in all directions that either asks for; lenient as these are."""
        asked: dict[str, set[str]] = {}
        for wanted in (self, other):
            for name in {pair[0].name for pair in wanted.pairs}:
                asked.setdefault(name, set()).update(wanted.directions.get(name, BOTH))
        return replace(self, pairs={**other.pairs, **self.pairs}, directions=asked)


@dataclass
class AlignmentText:
    """The text that models are aligned on.

    Attributes:
        samples: streamed. name: for records. key: what tells the samples and their order from others', None if unknown.
        count: of the samples, None if unknown.
    """

    samples: Iterator[Sample]
    name: str = ""
    key: str | None = None
    count: int | None = None


@dataclass
class SharedAlignments:
    """Alignments of the same models, kept in memory for modules that move one after another.

    Attributes:
        wanted: what all of these modules ask for, gathered in the pass of the first. made: by the key of their text.
    """

    wanted: WantedMaps
    made: dict[str, list[Alignment]] = field(default_factory=dict)

    def find(self, methods: Iterable[Method], text: str, wanted: WantedMaps) -> list[Alignment]:
        """The alignments by all methods on a text, none if one is lacking."""
        kept = self.made.get(text, [])
        found = [assembled(kept, method, wanted.moments([method])) for method in methods]
        return [one for one in found if one] if all(found) else []


class Aligner:
    """The alignments that the methods of one run need, made when they are first asked for.

    All methods that need text share one pass over it.

    Args:
        methods: all that may be asked for. given: an alignment to use in place of text.
        shared: those that modules before this one had made. on_ray: run the pass there.
    """

    def __init__(  # what is aligned, on what and how; given and shared ones stand in for it
        self,
        models: ModelPair,
        wanted: WantedMaps,
        methods: Sequence[Method],
        text: AlignmentText | None,
        config: PairConfig,
        run: Run,
        *,
        given: Alignment | None = None,
        shared: SharedAlignments | None = None,
        on_ray: RayPass | None = None,
    ) -> None:
        self.models, self.wanted, self.text, self.config, self.run = models, wanted, text, config, run
        self.shared = shared
        self.methods = [method for method in methods if method.needs_text]
        self.cache = AlignmentCache.of(config, text.key if text else None)
        self.on_ray, self.processes = on_ray, run.processes
        self.counts: PairingCounts | None = None
        self._made: dict[str, Alignment] = {}
        self._seen: set[int] | None = set()
        if given is not None:
            check_alignment(given, models)
            self._made[given.method] = given

    def alignment(self, method: Method) -> Alignment:
        """The alignment by one of the methods.

        Raises:
            TextError: it needs text, and there is none.
        """
        if method.name not in self._made:
            if method.moves_nothing:
                self._made[method.name] = shape_alignment(self.wanted.pairs, *self.models.fingerprints)
            elif not method.needs_text:
                self._made[method.name] = copy_alignment(self.wanted.pairs, *self.models.fingerprints)
            else:
                if self.text is None:
                    raise no_text(method.name)
                found = self._kept() or self._solved()
                self.counts = PairingCounts(**found[0].details["pairing"])
                self._made.update({alignment.method: alignment for alignment in found})
        return self._made[method.name]

    def _kept(self) -> list[Alignment]:
        """The alignments by all methods that other modules had made, none if one is lacking."""
        if self.shared is not None and (found := self.shared.find(self.methods, self._text_key, self.wanted)):
            return found
        if self.cache is None:
            return []
        kept = [self.cache.find(method, self.models.keys, self.wanted.moments([method])) for method in self.methods]
        return [one for one in kept if one] if all(kept) else []

    def _solved(self) -> list[Alignment]:
        """Stream, check, and solve with every method: in one pass, or in as many as their statistics need to fit."""
        check_tokenizers(self.models)
        parts = self._parts()
        solved = [self._part(part, last=part is parts[-1]) for part in parts]
        found = [
            replace(
                of_method[0],
                maps={pair: one for alignment in of_method for pair, one in alignment.maps.items()},
                diagnostics={pair: one for alignment in of_method for pair, one in alignment.diagnostics.items()},
            )
            for of_method in zip(*solved, strict=True)
        ]
        if self.cache is not None and self.processes.first:
            for method, alignment in zip(self.methods, found, strict=True):
                self.cache.keep(alignment, method, self.models.keys)
        if self.shared is not None:
            self.shared.made.setdefault(self._text_key, []).extend(found)
        return found

    @property
    def _gathered(self) -> WantedMaps:
        """What a pass is for: also what modules after this one will ask for."""
        return self.wanted if self.shared is None else self.wanted.widened(self.shared.wanted)

    @property
    def _holds_out(self) -> bool:
        return any(method.holds_out for method in self.methods)

    def _parts(self) -> list[Wanted]:
        """What the methods need, in as many parts as memory asks for; the same in every process."""
        wanted = self._gathered.moments(self.methods)
        limit = self.processes.least(
            memory_of_a_pass(self.models.teacher.device, self.config.parts if self.on_ray else 1)
        )
        return Layout.of(self.models, wanted).parts(wanted, limit, hold_out=self._holds_out)

    def _part(self, wanted: Wanted, *, last: bool) -> list[Alignment]:
        """The alignments of a part of the spaces, by every method, from one pass over the text.

        Those of a part that others follow are kept until all are there, so that a pass is not repeated.
        """
        key = self._key(wanted)
        kept = []
        lasting = all(method.is_built_in for method in self.methods)
        if self.run.work is not None and self.processes.alone and lasting and not last:
            kept = [self.run.work / f"{key[:16]}-{method.name}" for method in self.methods]
            if all(folder.is_dir() for folder in kept):
                with suppress(GraftError):  # damaged
                    return [Alignment.from_pretrained(folder) for folder in kept]
        with self.run.stage(PAIRING):
            totals, counts = self._totals(key, wanted, last=last)
            statistics = totals.statistics()
        if counts.nonfinite_pairs * 2 > counts.pairs:
            raise PairingError(
                "most activations are not finite",
                where=f"--dtype {self.config.dtype}",
                fix="use --dtype float32 or bfloat16",
            )
        sizes = self._gathered.pairs
        few = [  # which are an error where they are needed now
            pair
            for pair, (fit, held_out) in statistics.items()
            if (self.wanted.lenient or pair not in self.wanted.pairs)
            and pair[0].layer < 0
            and fit.count + held_out.count < max(sizes[pair])
        ]
        statistics = {pair: moments for pair, moments in statistics.items() if pair not in few}
        check_pairs(
            {
                pair: moments
                for pair, moments in statistics.items()
                if not (self.wanted.fits_heads and pair[0].name in SAMPLE_SPACES)
            }
        )
        with self.run.stage("solving alignments"):
            # As those that are found again, in a cache or beside an unfinished graft: the same text, the same graft.
            found = [
                solve_alignment(method, statistics, *self.models.fingerprints, self._details(counts)).as_stored()
                for method in self.methods
            ]
            found = [replace(one, seen=None if self._seen is None else frozenset(self._seen)) for one in found]
        for alignment, folder in zip(found, kept, strict=False):
            alignment.save_pretrained(folder, force=True)
        return found

    def _details(self, counts: PairingCounts) -> dict[str, object]:
        assert self.text is not None
        return {
            "teacher": self.models.teacher.name,
            "student": self.models.student.name,
            "text": self.text.name,
            "settings": self.config.record(),
            "pairing": asdict(counts),
            "versions": versions(),
            "hardware": hardware(self.config.device),
        }

    def _key(self, wanted: Wanted) -> str:
        """What tells a pass from all others."""
        parts = [*self.models.keys, self.config.record(), self._text_key, wanted, self._holds_out]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _text_key(self) -> str:
        """What tells the text from others: its key, or what its first samples say where it has none."""
        assert self.text is not None
        if self.text.key is not None:
            return self.text.key
        first = list(islice(self.text.samples, _FIRST))
        self.text.samples = chain(first, self.text.samples)
        return digest_of(sample.texts for sample in first)

    def _totals(self, key: str, wanted: Wanted, *, last: bool) -> tuple[Totals, PairingCounts]:
        assert self.text is not None
        samples = self.text.samples
        if not last:  # the next pass goes over the same text
            samples, self.text.samples = tee(samples)
        settings = CollectionSettings(max_tokens=self.config.max_tokens, samples=self.text.count)
        state = Unfinished(self.run.work, key) if self.run.work else None
        if self.on_ray:
            self._seen = None  # others read the text
            return collect_on_ray(
                self.on_ray,
                self.models,
                wanted,
                settings,
                self.run,
                hold_out=self._holds_out,
                unfinished=state,
            )
        totals, counts = collect_totals(
            self.models,
            self._noted(samples),
            wanted,
            settings,
            self.run,
            hold_out=self._holds_out,
            shard=Shard(self.processes.index, self.processes.count),
            unfinished=state,
        )
        if not self.processes.alone:
            totals.merge_processes(self.processes)
            counts.nonfinite_pairs = totals.nonfinite
        return totals, counts

    def _noted(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The same, and note which texts are read."""
        for sample in samples:
            if self._seen is not None:
                self._seen.update(map(key_of, sample.texts))
            yield sample


def no_text(what: str, why: str = "aligns the two models on text", *, alignment: bool = True) -> TextError:
    """The error for something that needs text and got none."""
    return TextError(
        f"{what} {why}, and none was given",
        where="--text",
        fix="name a text file or data set with --text" + (", or a saved alignment with --alignment" * alignment),
    )


def check_alignment(alignment: Alignment, models: ModelPair) -> None:
    """Refuse an alignment of other models.

    Raises:
        AlignmentError: a fingerprint differs.
    """
    for role, model, expected in (
        ("teacher", models.teacher, alignment.teacher),
        ("student", models.student, alignment.student),
    ):
        if model.fingerprint != expected:
            raise AlignmentError(
                f"the alignment was made for another {role}",
                where=model.name,
                expected=f"weights with fingerprint {expected[:12]}",
                found=model.fingerprint[:12],
                fix="make one for these models with `peft-graft align`",
            )


def check_tokenizers(models: ModelPair) -> None:
    """Refuse models whose text cannot be paired.

    Raises:
        PairingError: one came without its tokenizer. ModelError: a tokenizer is slow.
    """
    for model, role in ((models.teacher, "teacher"), (models.student, "student")):
        if model.tokenizer is None:
            raise PairingError("the model came without its tokenizer", where=role, fix="pass its fast tokenizer")
        check_tokenizer(model.tokenizer, model.name, role)
