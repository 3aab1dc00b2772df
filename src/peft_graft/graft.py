"""Grafts: what ``transfer`` returns, kept in memory until it is saved, and read back from a folder or the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import torch
from huggingface_hub import EvalResult

from peft_graft.alignment.alignment import Alignment
from peft_graft.card import write_model_card
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.beside import pipeline_options, processor_of, tokenizer_of, write_beside
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.task import with_task
from peft_graft.checkpoints.verify import verify
from peft_graft.config import EvaluateConfig
from peft_graft.config.base import AUTO, Dtype, as_dict
from peft_graft.config.graft_place import GraftPlaceConfig
from peft_graft.distill.agreement import Verdict
from peft_graft.errors import ModelError, VerificationError
from peft_graft.files import file_hashes, write_json
from peft_graft.hub import explained_upload
from peft_graft.models.devices import is_quantised, placed
from peft_graft.models.loading import Loading, ModelHandle, blank_handle, load_config, load_model
from peft_graft.models.task_models import quiet_libraries
from peft_graft.models.tasks import Task
from peft_graft.outputs import check_place, temporary_folder, write_aside, written_aside
from peft_graft.page.graft import PAGE, graft_page
from peft_graft.record import html_table
from peft_graft.report import REPORT, FileRecord, GraftReport, read_report

logger = logging.getLogger("peft_graft")


@dataclass(frozen=True)
class Graft:
    """A module on its student, how each site came about, and how to keep it.

    Attributes:
        checkpoint: the modules at the student's sites, and the head if one was carried.
        report: everything that ``graft.json`` will say.
        alignment: the maps that were used, reusable for every module of the same pair of models; None for a graft that
            was read back.
        student: the student's base model; described from its configuration, without weights, in a graft read back.
        folder: where the graft lies, None before it is saved. written: the checkpoint of a graft that was read back.
    """

    checkpoint: PeftCheckpoint = field(repr=False)
    report: GraftReport
    alignment: Alignment | None = field(repr=False)
    student: ModelHandle = field(repr=False)
    folder: Path | None = None
    written: RawCheckpoint | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        report = self.report
        return f"Graft({report.module_kind} of {report.teacher.name} on {report.student.name}: {report.verdict.level})"

    def _repr_html_(self) -> str:
        where = {"folder": str(self.folder)} if self.folder else {}
        table = html_table("Graft", [*self.report.summary.items(), *where.items()])
        if self.folder is None or not (self.folder / PAGE).is_file():
            return table
        page = self.folder / PAGE
        link = page.as_uri() if page.is_absolute() else quote(page.as_posix())  # as seen from the notebook
        return f'{table}<a href="{link}" target="_blank">report</a>'

    @property
    def verdict(self) -> Verdict:
        """How well it does what the teacher does: ``level``, ``text`` and the figures behind them."""
        return self.report.verdict

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's classes, empty where they are not known."""
        return self.checkpoint.head.labels if self.checkpoint.head else ()

    @property
    def raw(self) -> RawCheckpoint:
        """The checkpoint with the student's own paths, as it is written."""
        if self.written is not None:
            return self.written
        return checkpoint_of_student(self.checkpoint, self.student, self.report.settings.seed)

    @cached_property
    def _loaded_student(self) -> ModelHandle:
        """The student with weights, which are loaded only now for a graft that was read back."""
        if not self.student.is_blank:
            return self.student
        student = load_model(self.student.place, self.student.loading, role="student")
        _compare_student(student, self.report)
        return student

    @cached_property
    def model(self) -> Any:
        """The student with the module inside: a ``PeftModel``, or a model of ``adapters``.

        Ready for ``generate``, a Trainer or a pipeline. It shares the values of the student's matrices.

        Raises:
            DependencyError: the module's library is not installed.
        """
        with torch.inference_mode(mode=False):  # so that it trains, wherever it was first asked for
            student = self._loaded_student
            speaks = self.raw.task is Task.CAUSAL_LM
            return attach(self.raw, student, self.labels, trainable=True, speaks=speaks).model

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, None where it has none."""
        return tokenizer_of(self.student)

    def pipeline(self, **options: Any) -> Any:
        """A pipeline of transformers that answers as the graft does, with its head and the names of its classes.

        Args:
            options: of ``transformers.pipeline``, such as ``batch_size``; ``aggregation_strategy`` is ``first`` or
                ``simple`` where nothing is said, so that taggers give whole entities.

        Raises:
            ModelError: transformers has no pipeline for what the graft does; call ``model`` then.
        """
        import transformers

        task = self.raw.task.pipeline_tag
        if task is None and self.raw.task is Task.BASE:
            task = "feature-extraction"
        if task not in transformers.pipelines.get_supported_tasks():
            raise ModelError(
                f"transformers {transformers.__version__} has no pipeline for this",
                where=str(self.folder or "the graft"),
                found=self.raw.task,
                fix="call graft.model itself",
            )
        if (processor := processor_of(self.student)) is not None:
            sees = isinstance(processor, transformers.ImageProcessingMixin)
            options.setdefault("image_processor" if sees else "feature_extractor", processor)
        tokenizer = self.tokenizer
        options = {**pipeline_options(self.raw.task, tokenizer), **options}
        return transformers.pipeline(task, model=self.model.eval(), tokenizer=tokenizer, **options)

    def save_pretrained(self, folder: str | Path, *, force: bool = False, results: Sequence[EvalResult] = ()) -> Graft:
        """Write the checkpoint, load it back with its library, and only then put it in place.

        Args:
            folder: it must not exist.
            force: replace it if it does.
            results: of evaluations, for the card; ``Evaluation.eval_results`` has those of ``evaluate``.

        Returns:
            The same graft with ``folder`` and the verification in its report.

        Raises:
            OutputError: the folder exists and ``force`` is not set, or cannot be written.
            VerificationError: the written checkpoint does not load cleanly, or changes nothing.
        """
        return self._save(Path(folder), force=force, results=results)

    @quiet_libraries()
    def _save(
        self, out: Path, *, force: bool = False, hub_id: str | None = None, results: Sequence[EvalResult] = ()
    ) -> Graft:
        """See ``save_pretrained``; of a graft that goes to the hub as ``hub_id``, so that others can load it."""
        raw, student = self.raw, self._loaded_student
        names = written_names(student, raw.task)
        if hub_id:
            names = replace(names, name=self.report.student.hub_id or names.name)
        check_place(out, force=force)
        with written_aside(out, force=force) as staging:
            write_checkpoint(staging, raw, names)
            verification = verify(staging, raw, student, self.labels)
            notes = [*self.report.notes, *write_beside(staging, raw, student, self.labels)]
            if raw.head and self.checkpoint.head is None:
                notes.append(
                    f"an untrained head stands in for one that was not carried, as peft demands for {raw.task}"
                )
            if not verification.done:
                notes.append(f"not verified: {verification.library} is not installed")
            notes = list(dict.fromkeys(notes))
            report = self.report.model_copy(update={"verification": verification, "notes": notes})
            called = hub_id or out.absolute().name
            write_model_card(staging, report, raw, student, self.labels, names=names, graft=called, results=results)
            files = {
                name: FileRecord(size=(staging / name).stat().st_size, sha256=digest)
                for name, digest in file_hashes(staging).items()
            }
            report = report.model_copy(update={"files": files})
            write_json(staging / REPORT, report.model_dump(mode="json"))
            write_aside(staging / PAGE, graft_page(report, called), force=True)
        return replace(self, report=report, folder=out)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a graft",
        results: Sequence[EvalResult] = (),
    ) -> str:
        """Upload the graft to the hub, verified as ``save_pretrained`` does.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            private: whether a repository that is made is private.
            token: of the hub; by default the one that is logged in.
            revision: branch to commit to.
            commit_message: of the commit.
            results: of evaluations, for the card (``Evaluation.eval_results``).

        Returns:
            The address on the hub.

        Raises:
            OutputError: the hub cannot be reached, or refuses. VerificationError: the graft does not load, or its
                library is not installed.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with explained_upload(repo_id):
            repository = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        with temporary_folder() as place:
            saved = self._save(place / "graft", hub_id=repository, results=results)
            verification = saved.report.verification
            assert verification is not None
            if not verification.done:
                raise VerificationError(
                    f"a graft goes to the hub only once {verification.library} has loaded it, which is not installed",
                    where=repo_id,
                    fix=f"pip install {verification.library}",
                )
            with explained_upload(repo_id):
                api.create_repo(repository, private=private, exist_ok=True)
                if revision is not None:
                    api.create_branch(repository, branch=revision, exist_ok=True)
                found = api.upload_folder(
                    repo_id=repository, folder_path=str(saved.folder), revision=revision, commit_message=commit_message
                )
        return str(found)

    @classmethod
    def from_pretrained(  # the arguments of transformers, under their own names
        cls,
        name: str | Path,
        *,
        student: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        trust_remote_code: bool = False,
        device: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        dtype: Dtype | Literal["auto"] = "auto",
        quantization_config: Any = "auto",
    ) -> Graft:
        """Read a graft that was saved, from a folder or the hub; no weights of the student are loaded before needed.

        A student whose values are not those that the graft was made for is warned of once they are loaded.

        Args:
            student: where the student is now, if not where the report says.
            device: of the student: ``cpu``, ``cuda``, ...; ``auto`` is the GPU where there is one.
            device_map: spreads its layers (accelerate), in place of ``device``.
            dtype: it is loaded in; ``auto`` is as the graft was made.
            quantization_config: the same; ``None`` loads it as it is stored.

        Raises:
            CheckpointError: there is no graft, or its files are damaged.
            ModelError: the student cannot be reached.
            PlanError: no such dtype. DeviceError: no such device, once weights are loaded.
        """
        chosen = placed(EvaluateConfig(device=device, **({} if dtype == AUTO else {"dtype": dtype})))
        folder = locate(name, revision=revision, subfolder=subfolder, token=token)
        raw = read_checkpoint(folder)
        report = read_report(folder, str(name))
        place = str(student or report.student.reachable)
        loading = Loading(
            revision=report.settings.student_revision,
            token=token,
            trust_remote_code=trust_remote_code,
            quantization_config=as_dict(
                report.settings.quantization_config if quantization_config == AUTO else quantization_config
            ),
            device_map=device_map,
            device=chosen.device,
            dtype=report.settings.dtype if dtype == AUTO else chosen.dtype,
        )
        # Shapes are known where what quantises it is not installed.
        unquantised = replace(loading, quantization_config=None)
        handle = blank_handle(load_config(place, unquantised, role="student"), place, loading)
        raw = with_task(raw, handle.architecture)
        own = handle.base_tensors(output=raw.trains_output)
        checkpoint = resolve(raw, handle.architecture, own, with_head=report.head is not None)
        return cls(checkpoint, report, None, handle, folder, raw)


def _compare_student(student: ModelHandle, report: GraftReport) -> None:
    """Warn of a student with other values than a graft was made for, where it is loaded as it was then."""
    expected, found = report.student.fingerprint, student.loading
    as_stored = not is_quantised(student.base) and report.settings.quantization_config is None
    drawn = any(not name.startswith("pooler.") for name in student.missing)  # at random, anew each time
    if expected is None or not as_stored or drawn or found.dtype != report.settings.dtype:
        return
    if student.fingerprint != expected:
        logger.warning(
            "%s: this is not the model that the graft was made for; expected weights with fingerprint %s, found %s. "
            "Fix: name the student that it was moved to (%s), or transfer the module to this one",
            student.name,
            expected[:12],
            student.fingerprint[:12],
            report.student.hub_id or report.student.name,
        )


@dataclass(frozen=True)
class PlainModule:
    """A module that is no graft: its files, where they lie, and the model that it is on."""

    raw: RawCheckpoint
    folder: Path
    base: str


def graft_or_module(
    named: str | Path | Graft, base: str | Path | None, config: GraftPlaceConfig, option: str
) -> Graft | PlainModule:
    """What a user named: a graft, or a plain module, whichever lies there.

    Args:
        base: where its model is, if not where its files say. option: that says so, for messages.

    Raises:
        CheckpointError: there is none, or it cannot be read. ModelError: its model is not known or cannot be reached.
    """
    if isinstance(named, Graft):
        return named
    folder = locate(named, **config.place)
    if (folder / REPORT).is_file():
        return Graft.from_pretrained(named, student=base, trust_remote_code=config.trust_remote_code, **config.place)
    raw = read_checkpoint(folder)
    if base is None and raw.base_model is None:
        raise ModelError(
            "the module's configuration names no base model", where=str(named), fix=f"name it with {option}"
        )
    return PlainModule(raw, folder, str(base or raw.base_model))
