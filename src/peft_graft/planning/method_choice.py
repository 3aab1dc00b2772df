"""Which methods a transfer tries, and why: the default is decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.methods import METHODS, Method, automatic_methods
from peft_graft.config import AUTO, FRESH, GraftConfig
from peft_graft.errors import AlignmentError
from peft_graft.planning.sites import SitePlans

#: Mean cosine of the word embeddings from which on two models are taken to share their spaces.
SAME_SPACES: Final = 0.5


@dataclass(frozen=True)
class MethodChoice:
    """The methods to try, in this order, and why these."""

    methods: tuple[Method, ...]
    reason: str


def method_of_spaces(config: GraftConfig, given: Alignment | None) -> Method:
    """The method whose spaces a plan relates, before it is known which methods are tried."""
    name = config.method if config.method != AUTO else given.method if given else "copy"
    return METHODS[name]


def choose_methods(
    config: GraftConfig,
    sites: SitePlans,
    given: Alignment | None,
    *,
    has_text: bool,
    similarity: float | None,
    speaks: bool = False,
) -> MethodChoice:
    """The methods to try.

    Args:
        given: an alignment that the user made before. has_text: whether candidates can be compared on text.
        similarity: mean cosine of the two models' word embeddings, row by row (``vocabulary``), None
            where they differ in shape, or where the choice does not depend on it.
        speaks: whether a polish learns what the teacher says next.

    Raises:
        AlignmentError: the given alignment was made with another method than the one asked for.
    """
    if given is not None:
        return _of_alignment(config, given)
    if config.method != AUTO:
        return MethodChoice((METHODS[config.method],), "asked for")
    first, reason = _without_text(sites, similarity)
    if not has_text:
        return MethodChoice((first,), reason)
    if speaks:
        return _before_learning(sites, first, reason)
    tried = [method for method in automatic_methods() if method.needs_text or method is first]
    return MethodChoice(tuple(tried), reason)


def expected_methods(
    config: GraftConfig, sites: SitePlans, given: Alignment | None, *, speaks: bool = False
) -> list[Method]:
    """What may be tried, as far as shapes tell.

    Raises:
        AlignmentError: see ``choose_methods``.
    """
    if given is not None:
        return list(_of_alignment(config, given).methods)
    if config.method != AUTO:
        return [METHODS[config.method]]
    if speaks:
        return [METHODS[name] for name in (("copy", "prune-align", FRESH) if same_sizes(sites) else (FRESH,))]
    return [method for method in automatic_methods() if method.needs_text or same_sizes(sites)]


def same_sizes(sites: SitePlans) -> bool:
    """Whether all spaces have as many units in the student as in the teacher."""
    return all(first == second for first, second in sites.pairs.values())


def _of_alignment(config: GraftConfig, given: Alignment) -> MethodChoice:
    if config.method == AUTO:
        return MethodChoice((METHODS[given.method],), "the method of the given alignment")
    wanted = METHODS[config.method]
    if wanted.name != given.method and not (wanted.fits_layers and given.method == "prune-align"):
        raise AlignmentError(
            "the alignment was made with another method",
            where="--method",
            expected=given.method,
            found=config.method,
            fix="leave --method out, or align again",
        )
    return MethodChoice((wanted,), "asked for")


def _before_learning(sites: SitePlans, first: Method, reason: str) -> MethodChoice:
    """What is worth trying beside an untrained module, where what the teacher says next is learned.

    Between models of unlike sizes weights carry over next to nothing (docs/results/decoders.md), and an alignment takes
    the time of many steps.
    """
    if same_sizes(sites):
        return MethodChoice((first, METHODS[FRESH]), reason)
    return MethodChoice((METHODS[FRESH],), f"{reason}, and learning what the teacher says does better from afresh")


def _without_text(sites: SitePlans, similarity: float | None) -> tuple[Method, str]:
    """``copy`` where the models share their spaces, else ``prune-align``; and the reason."""
    different = next((pair for pair, (first, second) in sites.pairs.items() if first != second), None)
    if different:
        sizes = sites.pairs[different]
        return METHODS["prune-align"], (
            f"the models differ in size ({different[0]} has {sizes[0]} units, the student's {sizes[1]})"
        )
    if similarity is None:
        return METHODS["prune-align"], "sizes are equal, but the models have different vocabularies"
    if similarity < SAME_SPACES:
        return METHODS["prune-align"], (
            f"sizes are equal, but the word embeddings have little in common (mean cosine {similarity:.2f})"
        )
    return METHODS["copy"], f"sizes are equal and the word embeddings agree (mean cosine {similarity:.2f})"
