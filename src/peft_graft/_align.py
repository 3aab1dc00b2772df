"""``align``: two models aligned once, for every module that will move between them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peft_graft.alignment.aligner import Aligner, AlignmentText, WantedMaps
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.methods import METHODS, Method
from peft_graft.alignment.sharding import RayPass, check_models_on_ray, check_text_on_ray
from peft_graft.alignment.text import Sample, TextLike, TextSource, rows_given
from peft_graft.cluster import check_alone, start_ray
from peft_graft.config import AlignConfig, known_arguments
from peft_graft.errors import PlanError
from peft_graft.models.devices import placed
from peft_graft.models.loading import ModelPair
from peft_graft.outputs import check_apart, check_place, reserving_output
from peft_graft.planning.experts import SAMPLES, match_experts
from peft_graft.planning.kept_layers import with_kept_layers
from peft_graft.planning.sources import ModelSources
from peft_graft.planning.spaces import directions_of_roles, expert_pairs, spaces_of_roles
from peft_graft.processes import Processes
from peft_graft.progress import watchers
from peft_graft.run import UNFINISHED, Callback, Run
from peft_graft.surroundings import undisturbed


@known_arguments(AlignConfig)
@reserving_output
@undisturbed
def align(
    teacher: str | Path,
    student: str | Path,
    *,
    text: TextLike,
    out: str | Path | None = None,
    config: AlignConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Alignment:
    """Align two models once, for every module that will move between them.

    Among the processes of torchrun or accelerate each runs its share of the text, all return the same, and the first
    writes. An interrupted pass goes on when the same is asked for again with the same ``out``.

    Args:
        teacher: folder or hub id of the modules' own model.
        student: folder or hub id of the model that they move to.
        text: unlabelled text, as for ``transfer``; on Ray a file or a data set of the hub.
        out: folder to write the alignment to; nothing is written without it.
        config: how to align, and on which device; an ``AlignConfig``, or a dict of its fields.
        callbacks: watch the run.

    Raises:
        GraftError: as for ``transfer``.
    """
    text = rows_given(text)
    config = placed(AlignConfig.of(config))
    method = _checked_method(config)
    check_alone(config.ray)
    if config.ray:
        check_models_on_ray(teacher=teacher, student=student)
        check_text_on_ray(text)
        start_ray(config.ray)
    if out is not None:
        check_place(Path(out), force=config.force)
        check_apart(out, [teacher, student, text])
    sources = ModelSources(teacher, student, config)
    shapes = sources.described()
    architectures = shapes.teacher.architecture, shapes.student.architecture
    # Here for what it refuses, before weights are loaded; they may tell other layers.
    spaces_of_roles(*architectures, layers=config.layers, roles=config.sites)
    source = TextSource(text, config.columns, config.seed)
    samples = source.samples()
    processes = Processes.started()
    run = Run(watchers(callbacks), Path(f"{out}{UNFINISHED}") if out is not None else None, processes)
    with run.stage("loading models"):
        models = sources.loaded(tokenizers=True)
    on_ray = RayPass.of(models, source.samples, config) if config.ray else None
    wanted, samples = _wanted(models, config, samples)
    read = AlignmentText(samples, source.name, source.key)
    found = Aligner(models, wanted, [method], read, config, run, on_ray=on_ray).alignment(method)
    if out is not None and processes.first:
        found.save_pretrained(out, force=config.force)
        shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    processes.wait()
    return found


def _wanted(models: ModelPair, config: AlignConfig, samples: Iterator[Sample]) -> tuple[WantedMaps, Iterator[Sample]]:
    """The maps of every module at the sites, and the samples, some of which were read to match experts."""
    architectures = models.teacher.architecture, models.student.architecture
    layers, _ = with_kept_layers(config.layers, models)
    experts = None
    if expert_pairs(*architectures, layers):
        start = list(islice(samples, SAMPLES))
        experts, samples = match_experts(models, start, layers), chain(start, samples)
    pairs = spaces_of_roles(*architectures, layers=layers, roles=config.sites, experts=experts)
    return WantedMaps(pairs, directions_of_roles(architectures[0], config.sites), lenient=True), samples


def _checked_method(config: AlignConfig) -> Method:
    """The method, which must have maps of its own.

    Raises:
        PlanError: it has none.
    """
    method = METHODS[config.method]
    if not method.needs_text:
        raise PlanError(f"{method.name} needs no alignment", where="--method", fix="call transfer without one")
    if method.fits_layers:
        raise PlanError(f"{method.name} has no maps of its own", where="--method", fix="align with prune-align")
    return method
