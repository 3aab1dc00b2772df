"""Which stacks, roles and experts of two models correspond: the translation between families of different make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import EMBEDDED, Site, Space
from peft_graft.models.spec import PREFIX_ROLE, PROMPT_ROLE, Stack, expert_of, with_expert

#: (teacher layer, student layer) -> for every student expert the teacher's that it takes its module from, -1 for none.
ExpertMap = Mapping[tuple[int, int], tuple[int, ...]]


def corresponding_stacks(teacher: Architecture, student: Architecture) -> list[tuple[Stack, Stack]]:
    """Pairs of (teacher, student) stacks that modules can move between.

    Stacks of one kind correspond: a BERT to the encoder of a BART, a Llama to its decoder. So do two text models of one
    stack each, whatever they are. What reads images or sound has nothing in common with what reads text.
    """
    first, second = teacher.row.stacks, student.row.stacks
    if len(first) == len(second) == 1 and teacher.row.reads_text and student.row.reads_text:
        return [(first[0], second[0])]
    return [(one, other) for one in first for other in second if one.kind == other.kind]


def corresponds(stacks: Sequence[tuple[Stack, Stack]], role: str, student: Architecture) -> bool:
    """Whether the student has a role like this one of the teacher; which of its experts, is another question."""
    if role == PROMPT_ROLE:
        return Space(-1, EMBEDDED) in student.sizes
    found = [(second, first.local(role)) for first, second in stacks]
    names = {stack.full(with_expert(local, 0)) for stack, local in found if local is not None}
    virtual = {PREFIX_ROLE} if len(student.row.stacks) == 1 else set()
    return bool(names & {*student.roles, *virtual})


def counterpart(site: Site, stacks: tuple[Stack, Stack], layer: int, experts: ExpertMap | None) -> Site | None:
    """Where a teacher's place lies in a layer of the student, None where nothing corresponds."""
    local = stacks[0].local(site.role)
    if local is None:
        return None
    expert = expert_of(local)
    if expert is not None and experts is not None:
        matched = experts.get((site.layer, layer), ())  # none where the student's layer has no experts
        if expert not in matched:
            return None
        local = with_expert(local, matched.index(expert))
    return Site(layer, stacks[1].full(local))


def advice(role: str, stacks: Sequence[tuple[Stack, Stack]], student: Architecture) -> str:
    """What to do about a role of the teacher that the student has no counterpart of."""
    if not stacks:
        return "choose a student that reads what the teacher reads"
    if all(first.local(role) is None for first, _ in stacks):
        stack = role.partition(".")[0]
        return (
            f"a {student.model_type} has no {stack}: choose a student that has, or train the module without the {stack}"
        )
    if ".cross." in f".{role}":
        return "train the module without the cross attention, or choose a student that has an encoder and a decoder"
    if expert_of(role) is not None:
        return "train the module without the experts, or choose a student that is a mixture of experts too"
    fix = "choose a student of a family that has it"
    return fix + (", or move a LoRA" if role.endswith("adapter") else "")
