"""Functional grafting: modules fitted so that the student's layers move as the teacher's do under its module.

A map takes a weight from one space to another and hopes that its function follows. Here the function is what is fitted.
For every site, over paired tokens of a text, with the module on (') and off:

    target_i = W (y_t'(i) - y_t(i)) - (y_s'(i) - y_s(i))        W: ridge regression of y_s on y_t
    B A      = argmin over rank r of sum |target_i - B A x_s'(i)|^2

y is the site's output and x its input; the second term is what the layers below, grafted already, have moved at this
site. An update has no constant part, so nothing is centred. The minimiser is the truncated singular value decomposition
of the full ridge regression in the metric of the inputs (reduced-rank regression, Izenman 1975). Layers are fitted from
the first to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_graft.alignment.activations import Capture
from peft_graft.alignment.methods.ridge import choose_penalty, ridge_solution
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.finite import check_finite
from peft_graft.distill.teacher import ReadSamples, read_by_both
from peft_graft.errors import AlignmentError
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spaces import Site, Space
from peft_graft.models.spec import VOCABULARY_ROLES
from peft_graft.modules.lora import LoraModule
from peft_graft.planning.sites import SitePlan, SitePlans
from peft_graft.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Samples that the modules are fitted on.
SAMPLES = 500
STAGE = "fitting layers"
#: Activations held at a time; layers are fitted in groups that stay below.
_MOST_BYTES = 2 << 30


def fit_modules(
    moved: PeftCheckpoint, plan: SitePlans, distillation: Distillation, run: Run
) -> tuple[PeftCheckpoint, AttachedModel]:
    """The student's modules, fitted site by site, and the student with them inside.

    Args:
        moved: modules at the student's sites; their ranks and scalings are kept, their values are not used.
        distillation: of whose training text the first ``SAMPLES`` samples are used.

    Raises:
        AlignmentError: a module is no LoRA at a linear layer, or the text pairs too few words for the widest space.
    """
    student = distillation.models.student
    plan = replace(plan, sites=tuple(site for site in plan.sites if site.student.layer >= 0))
    _check_fittable(moved, student)
    text = read_by_both(distillation.models, distillation.samples[:SAMPLES], "words")
    groups = list(_groups(plan, distillation.models, sum(map(len, text[0].places))))
    modules = {site: module if site.layer < 0 else module.neutral() for site, module in moved.modules.items()}
    attached = distillation.attach(replace(moved, modules=modules))
    position = student.architecture.position
    for group in groups:
        bare = _Outputs.of(group, distillation, text)
        for layer in sorted({position(site.student) for site in group}):
            sites = [site for site in group if position(site.student) == layer]
            spaces = {side(student, site.student) for site in sites for side in (_input, _output)}
            now = _gather(text[1], attached.base, spaces)
            for site in sites:
                module = modules[site.student]
                assert isinstance(module, LoraModule)
                target = bare.target(site, now, distillation.models)
                modules[site.student] = _fitted(module, now[_input(student, site.student)], target)
            attached.load(checkpoint_of_student(replace(moved, modules=modules), student))
            run.progress(STAGE, layer + 1, student.architecture.num_layers)
    return replace(moved, modules=modules), attached


def _check_fittable(moved: PeftCheckpoint, student: ModelHandle) -> None:
    roles = student.architecture.row.linears
    for place, module in moved.modules.items():
        if place.role in VOCABULARY_ROLES:  # moved, and active while the others are fitted
            continue
        plain = isinstance(module, LoraModule) and module.is_plain
        if not plain or place.role not in roles or roles[place.role].fused:
            raise AlignmentError(
                "functional grafting fits the updates of linear layers",
                where=str(place),
                expected="a plain LoRA on a layer of its own",
                fix="use another --method",
            )


@dataclass(frozen=True)
class _Outputs:
    """What sites put out: the teacher's without its module and with it, and the bare student's."""

    teacher: Mapping[Space, Tensor]
    adapted: Mapping[Space, Tensor]
    student: Mapping[Space, Tensor]

    @classmethod
    def of(
        cls, group: Sequence[SitePlan], distillation: Distillation, text: tuple[ReadSamples, ReadSamples]
    ) -> _Outputs:
        teacher, student = distillation.models.teacher, distillation.models.student
        of_teacher = {_output(teacher, source) for site in group for source in site.teacher}
        return cls(
            _gather(text[0], teacher.base, of_teacher),
            _gather(text[0], distillation.teacher.base, of_teacher),
            _gather(text[1], student.base, {_output(student, site.student) for site in group}),
        )

    def target(self, site: SitePlan, now: Mapping[Space, Tensor], models: ModelPair) -> Tensor:
        """What the site's update has to add to what the layers below have moved already, [words, d_out], float64."""
        writes = _output(models.student, site.student)
        shifts = []
        for source in site.teacher:
            space = _output(models.teacher, source)
            mapping = _regression(_centred(self.teacher[space]), _centred(self.student[writes]))
            shifts.append((self.adapted[space] - self.teacher[space]).double() @ mapping.T)
        return torch.stack(shifts).mean(0) - (now[writes] - self.student[writes]).double()


def _groups(plan: SitePlans, models: ModelPair, words: int) -> Iterator[list[SitePlan]]:
    """Sites of consecutive layers whose activations can be held together.

    Raises:
        AlignmentError: there are fewer words than the widest space has units.
    """
    group: list[SitePlan] = []
    held = 0
    teacher, student = models.teacher, models.student
    position = student.architecture.position
    for layer in sorted({position(site.student) for site in plan.sites}):
        sites = [site for site in plan.sites if position(site.student) == layer]
        of_teacher = [teacher.architecture.size(_output(teacher, source)) for site in sites for source in site.teacher]
        of_student = [
            student.architecture.size(space(student, site.student)) for site in sites for space in (_input, _output)
        ]
        widest = max(of_teacher + of_student)
        if words < widest:
            raise AlignmentError(
                "too few paired words for the dimension",
                where=f"layer {layer}",
                expected=f"at least {widest}",
                found=words,
                fix="give more text",
            )
        needed = 4 * words * (2 * sum(of_teacher) + 2 * sum(of_student))
        if group and held + needed > _MOST_BYTES:
            yield group
            group, held = [], 0
        group, held = group + sites, held + needed
    yield group


def _input(model: ModelHandle, site: Site) -> Space:
    return Space(site.layer, model.architecture.row.linears[site.role].reads)


def _output(model: ModelHandle, site: Site) -> Space:
    return Space(site.layer, model.architecture.row.linears[site.role].writes)


def _gather(text: ReadSamples, base: PreTrainedModel, spaces: set[Space]) -> dict[Space, Tensor]:
    """space -> activations at the places of all samples, [places, d] float32, in the order of the samples.

    Args:
        base: of the model that reads the text, with a module inside or not.
    """
    model, places = replace(text.model, base=base), text.places
    found = {space: [torch.empty(0)] * len(places) for space in spaces}

    def read(row: int) -> str:
        assert model.tokenizer is not None
        return str(model.tokenizer.decode(text.inputs[row]["input_ids"], skip_special_tokens=True))

    with torch.inference_mode(), Capture(model, spaces, stop=True) as capture:
        for rows in text.batches():
            held = capture.forward(text.padded(rows, model.device))
            counts = [len(places[row]) for row in rows]
            index = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
            columns = torch.tensor([start for row in rows for start, _ in places[row]], dtype=torch.long)
            for space, value in held.items():
                values = value[index, columns].float().cpu()
                check_finite(values, model.name, (read(row) for row in rows), counts)
                for row, own in zip(rows, torch.split(values, counts), strict=True):
                    found[space][row] = own
    return {space: torch.cat(values) for space, values in found.items()}


def _centred(x: Tensor) -> Tensor:
    return x.double() - x.double().mean(0)


def _regression(x: Tensor, y: Tensor) -> Tensor:
    """The ridge regression of y [n, k] on x [n, d], [k, d], all float64; the last fifth of rows chooses the penalty."""
    cut = len(x) * 4 // 5
    moments, crosses = (
        [part.T @ other / len(part) for part, other in ((x[:cut], z[:cut]), (x[cut:], z[cut:]))] for z in (x, y)
    )
    penalty, _ = choose_penalty(
        moments[0], crosses[0].T, moments[1], crosses[1].T, float(y[cut:].square().sum() / (len(y) - cut))
    )
    return ridge_solution(x.T @ x, (x.T @ y).T, penalty)


def _fitted(module: LoraModule, inputs: Tensor, target: Tensor) -> LoraModule:
    """The rank-r update that takes the inputs [n, d_in] closest to the target [n, d_out]."""
    x = inputs.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = values.clamp_min(1e-9).sqrt()
    u, s, v = torch.linalg.svd(_regression(x, target) @ vectors * root, full_matrices=False)
    width = min(module.width, len(s))
    a, b = (torch.zeros_like(module.tensors[name].values, dtype=torch.float64) for name in ("A", "B"))
    a[:width] = s[:width].sqrt()[:, None] * v[:width] / root @ vectors.T
    b[:, :width] = u[:, :width] * s[:width].sqrt() / module.scaling
    dtype = module.tensors["A"].values.dtype
    fitted = module.with_values({"A": a.to(dtype), "B": b.to(dtype)})
    assert isinstance(fitted, LoraModule)
    return fitted
