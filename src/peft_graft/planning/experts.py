"""Which experts of two mixtures correspond: those to which the routers send the same tokens.

An expert's number means nothing. What identifies it is when it is called, so experts are assigned to each other by the
correlation of the routers' logits over text, as units are (``prune-align``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.collect import CollectionSettings, check_pairs, collect
from peft_graft.alignment.methods.prune_align import assign_by_correlation
from peft_graft.alignment.text import Sample
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import ModelPair
from peft_graft.models.spec import expert_of
from peft_graft.planning.correspondence import ExpertMap
from peft_graft.planning.spaces import expert_pairs

#: Paired tokens that are enough to correlate the few logits of a router.
MAX_TOKENS = 10_000
#: Samples that give about as many.
SAMPLES = 2000


def match_experts(models: ModelPair, samples: Iterable[Sample], layers: str) -> ExpertMap | None:
    """For every pair of layers of a layer map the teacher's expert for each of the student's; None without experts.

    Args:
        samples: unlabelled text; the first ``MAX_TOKENS`` paired tokens are used. layers: see ``planning.layers``.

    Raises:
        PairingError: fewer tokens pair than there are experts.
    """
    pairs = list(expert_pairs(models.teacher.architecture, models.student.architecture, layers))
    if not pairs:
        return None
    settings = CollectionSettings(max_tokens=MAX_TOKENS)
    statistics, _ = collect(models, samples, dict.fromkeys(pairs, ()), settings)
    check_pairs(statistics)
    return {
        (first.layer, second.layer): tuple(assign_by_correlation(fit)[0].indices.tolist())
        for (first, second), (fit, _) in statistics.items()
    }


def matched_experts(pairs: Iterable[Pair], student: Architecture) -> ExpertMap:
    """The experts that an alignment of these pairs of spaces matched."""
    found: dict[tuple[int, int], dict[int, int]] = {}
    for first, second in pairs:
        theirs, own = expert_of(first.name), expert_of(second.name)
        if theirs is not None and own is not None:
            found.setdefault((first.layer, second.layer), {})[own] = theirs
    number = 1 + max((expert_of(role) or 0 for role in student.row.linears), default=0)
    return {layers: _listed(matched, number) for layers, matched in found.items()}


def _listed(matched: Mapping[int, int], number: int) -> tuple[int, ...]:
    return tuple(matched.get(expert, -1) for expert in range(number))
