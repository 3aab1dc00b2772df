"""How ``transfer`` moves a module, and what every verb that runs two models asks for."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from peft_graft.config.base import (
    AUTO,
    CHAT,
    FRESH,
    HOW,
    LOADING,
    MADE_PROMPTS,
    MAX_PROMPTS,
    MAX_TOKENS,
    OUTPUT,
    POLISH_STEPS,
    PROMPT_PASSES,
    PROMPTS,
    WHAT,
    WHERE,
    Config,
    Dtype,
    Force,
    HeadChoice,
    Library,
    Option,
    Token,
    TrustRemoteCode,
    as_dict,
    as_names,
    check_method,
)
from peft_graft.errors import PlanError
from peft_graft.labels import Labels, ProblemType


class PairConfig(Config):
    """What every verb that runs a teacher and a student asks for.

    Attributes:
        ray: run what can be shared out on Ray, by a cluster's address or ``local``, in ``shards`` parts.
    """

    layers: Annotated[str, Option(WHAT, "auto, skip, avg, or a teacher layer for each: 0,2,4.")] = Field(
        default="auto",
        description="skip (every k-th layer), avg (the mean of every window), or one teacher layer for each student "
        "layer: 0,2,4. auto: those whose weights the student's layers have, where it was cut out of the teacher, else "
        "skip. For models of several stacks one map for all, or encoder=skip;decoder=0,2.",
    )
    columns: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_names),
        Option(HOW, "Column of a table's text; of pairs two: a,b."),
    ] = Field(default=None, description="Column of the text, or two columns of sentence pairs: premise,hypothesis.")
    max_tokens: Annotated[int, Option(HOW)] = Field(
        default=MAX_TOKENS, ge=1, description="Paired tokens that the alignment sees at most."
    )
    seed: Annotated[int, Option(HOW)] = Field(
        default=0, description="Of the order in which text is sampled, and of training."
    )
    device: Annotated[str, Option(WHERE, "auto, cpu, cuda, cuda:1, ...")] = Field(
        default=AUTO, description="cpu, cuda, cuda:1, ...; auto is the GPU where there is one."
    )
    student_device: Annotated[str | None, Option(WHERE)] = Field(
        default=None, description="The student's device, if it differs."
    )
    device_map: Annotated[str | dict[str, Any] | None, Option(WHERE)] = Field(
        default=None,
        description="auto spreads the layers of both models over what is there (accelerate), in place of --device.",
    )
    dtype: Annotated[Dtype, Option(WHERE, "of the forward passes.")] = Field(
        default="float32", description="Of the forward passes."
    )
    quantization_config: Annotated[dict[str, Any] | None, BeforeValidator(as_dict), Option(WHERE)] = Field(
        default=None,
        description="Load both models quantised: transformers' quantization_config as JSON, such as "
        '{"load_in_4bit": true}.',
    )
    ray: Annotated[str | None, Option(WHERE, decides=False)] = Field(
        default=None, description="Run on Ray: local for this machine, or a cluster's address."
    )
    shards: Annotated[int | None, Option(WHERE, decides=False)] = Field(
        default=None, description="Parts of the text, or of the prompts, on Ray; one for each CPU by default."
    )
    teacher_revision: Annotated[str | None, Option(LOADING)] = Field(
        default=None, description="Hub revision of the teacher."
    )
    student_revision: Annotated[str | None, Option(LOADING)] = Field(
        default=None, description="Hub revision of the student."
    )
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    cache: Annotated[bool | None, Option(OUTPUT, decides=False)] = Field(
        default=None,
        description="Keep alignments for later modules of the same models and text, and use kept ones, in the cache of "
        "huggingface_hub or where PEFT_GRAFT_CACHE says; on by default where that is set.",
    )
    force: Force = False

    @model_validator(mode="after")
    def _shards_are_on_ray(self) -> Self:
        if self.shards is not None and (self.shards < 1 or self.ray is None):
            raise PlanError(
                "shards are parts of what is done on Ray, one at least",
                where="--shards",
                found=self.shards,
                fix="say --ray local, or start several processes with torchrun",
            )
        return self

    @property
    def parts(self) -> int:
        """Parts of what is shared out on Ray."""
        return self.shards or os.cpu_count() or 1


class GraftConfig(PairConfig):
    """How ``transfer`` moves a module, and what ``inspect`` plans.

    Attributes:
        layers: ``auto``, ``skip``, ``avg`` or one teacher layer for each student layer (``planning.layers``,
            ``planning.kept_layers``).
        method: a registered method; ``auto`` takes the one whose graft agrees best with the teacher on held-out text,
            and without text ``copy`` where the models share their spaces.
        polish: steps of label-free training; ``auto`` is ``POLISH_STEPS`` where the method is ``auto`` too and there
            is text, else 0.
    """

    method: Annotated[
        str,
        Option(HOW, "auto, the best of several, or one of copy, prune-align, procrustes, ridge, functional, fresh."),
    ] = Field(default=AUTO, description="auto takes whichever graft agrees best with the teacher.")
    head: Annotated[HeadChoice, Option(WHAT, "the classification head.")] = Field(
        default="auto",
        description="The classification head saved with the module: carry it through the maps, fit it to the teacher's "
        "predictions on the text, drop it, or auto: carry or fit, whichever agrees better with the teacher.",
    )
    polish: Annotated[
        int | Literal["auto"],
        Option(HOW, f"Training steps, auto ({POLISH_STEPS}) or 0."),
    ] = Field(
        default="auto",
        description=f"Steps of label-free training on the teacher's predictions; auto is {POLISH_STEPS} if there is "
        "text and no --method, else 0. An interrupted polish goes on when the same command is run again.",
    )
    sites: Annotated[tuple[str, ...] | None, BeforeValidator(as_names), Option(WHAT)] = Field(
        default=None,
        description="Modules to move, by role (attn.value,ffn.*), layer (0/*) or head (attn.value@0+3); all by "
        "default.",
    )
    library: Annotated[Library | None, Option(WHAT)] = Field(
        default=None, description="Write a LoRA for peft or for adapters; for the module's own library by default."
    )
    for_: Annotated[Literal["gguf", "vllm"] | None, Option(WHAT, later=True)] = Field(
        default=None,
        description="Move a language model's module as a LoRA that a server takes: gguf (llama.cpp, Ollama) or vllm, "
        "as which `export` then writes it. DoRA and IA3 become LoRA, and what cannot is refused at once.",
    )
    format: Annotated[str | None, Option(PROMPTS, later=True)] = Field(
        default=None,
        description="How the module was trained to read a prompt, where not by its model's chat template, and how the "
        "student shall: 'Question: {prompt}\\nAnswer:'.",
    )
    student_format: Annotated[str | None, Option(PROMPTS, later=True)] = Field(
        default=None, description="The student's format, where it differs: chat for its chat template."
    )
    system: Annotated[str | None, Option(PROMPTS, later=True)] = Field(
        default=None, description="System message of prompts that have none."
    )
    template_args: Annotated[dict[str, Any] | None, Option(PROMPTS, later=True)] = Field(
        default=None, description='Arguments of the chat templates as JSON, such as {"enable_thinking": false}.'
    )
    labels: Annotated[Labels, Option(WHAT, later=True)] = Field(
        default="ignore",
        description="Names of a head's classes where no file has them: O,B-PER,I-PER, or a JSON or text file. Of a "
        "language model, answers that come with the prompts: ignore, or use: learn them in place of the teacher's.",
    )
    problem_type: Annotated[ProblemType | None, Option(WHAT, later=True)] = Field(
        default=None,
        description="What the outputs of a classifier of whole texts are, where neither the module's files nor the "
        "teacher's configuration say it: one class that holds, labels each of which holds or not, or numbers.",
    )
    learn: Annotated[Literal["distributions", "text"], Option(PROMPTS, later=True)] = Field(
        default="distributions",
        description="Of the teacher's answers: distributions, its next-token distributions wherever tokens pair, or "
        "text, their text alone.",
    )
    max_prompts: Annotated[int, Option(PROMPTS, later=True)] = Field(
        default=MAX_PROMPTS, ge=1, description="Prompts that the teacher answers at most, or documents to learn from."
    )
    make_prompts: Annotated[int, Option(PROMPTS, later=True)] = Field(
        default=MADE_PROMPTS,
        ge=1,
        description="Prompts that are made from --seeds at most, a fifth of which choose or judge; no more than "
        "--max-prompts.",
    )
    max_new_tokens: Annotated[int, Option(PROMPTS, later=True)] = Field(
        default=256, ge=1, description="Tokens of an answer; a longer one is cut."
    )
    max_length: Annotated[int | None, Option(PROMPTS, later=True)] = Field(
        default=None,
        description="Tokens of a prompt with its answer, by default what the models read; of a document 512.",
    )
    on_policy: Annotated[float, Option(PROMPTS, later=True)] = Field(
        default=0.0,
        ge=0,
        description="Share of the polish, its end, that learns from the student's own answers.",
    )
    gradient_checkpointing: Annotated[bool, Option(WHERE, later=True)] = Field(
        default=False, description="Compute activations anew in the backward pass: less memory, more time."
    )
    revision: Annotated[str | None, Option(LOADING)] = Field(default=None, description="Hub revision of the module.")
    subfolder: Annotated[str | None, Option(LOADING)] = Field(
        default=None, description="Folder of the module in its repository."
    )

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        check_method(self.method, allow_auto=True)
        if self.polish != AUTO and int(self.polish) < 0:
            raise PlanError("must not be negative", where="--polish", found=self.polish)
        if self.on_policy > 1:
            raise PlanError("must not be more than 1", where="--on-policy", found=self.on_policy)
        if self.method == FRESH and not self.polish_steps:
            raise PlanError(
                "a fresh module is of no use without a polish",
                where="--method fresh",
                fix=f"give --polish {POLISH_STEPS}",
            )
        return self

    @property
    def polish_steps(self) -> int:
        """Steps of the polish where there is text."""
        if self.polish == AUTO:
            return POLISH_STEPS if self.method == AUTO else 0
        return int(self.polish)

    @property
    def prompts_to_make(self) -> int:
        """How many prompts are made of examples."""
        return min(self.make_prompts, self.max_prompts)

    @property
    def format_of_student(self) -> str | None:
        """The student's format; None for its chat template."""
        own = self.format if self.student_format is None else self.student_format
        return None if own == CHAT else own

    def polish_steps_on(self, prompts: int, batch_size: int) -> int:
        """Steps of the polish on so many prompts: some passes over them where nothing is said."""
        steps = self.polish_steps
        return min(steps, -(-PROMPT_PASSES * prompts // batch_size)) if self.polish == AUTO else steps
