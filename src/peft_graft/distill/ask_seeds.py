"""From examples that a user gives to the prompts that the teacher is asked."""

from __future__ import annotations

import json

from peft_graft.alignment.text import TextLike
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.ask_prompts import LEAST_PROMPTS, Asking
from peft_graft.distill.generate import AnswerStore
from peft_graft.distill.make_prompts import Listing, MadePrompts, make_prompts
from peft_graft.errors import PlanError, TextError
from peft_graft.models.loading import ModelPair
from peft_graft.models.output import language_model
from peft_graft.models.tasks import Task
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike
from peft_graft.prompts.seeds import Seeds
from peft_graft.run import Run

STAGE = "making prompts"


def seeds_of(
    seeds: PromptLike | None, text: TextLike | PromptLike | None, raw: RawCheckpoint, config: GraftConfig
) -> Seeds | None:
    """The examples that prompts are to be made from; None where there are none.

    Raises:
        PlanError: there is text too, or the module is no language model's. TextError: see ``Seeds.of``.
    """
    if seeds is None:
        return None
    if text is not None:
        raise PlanError(
            "prompts are made where there are none, and there is text",
            where="--seeds",
            fix="give --text or --seeds, not both",
        )
    if raw.task is not Task.CAUSAL_LM:
        raise PlanError(
            "prompts are for language models",
            where="--seeds",
            expected=f"a module of {Task.CAUSAL_LM}",
            found=str(raw.task),
            fix="give unlabelled text with --text",
        )
    return Seeds.of(seeds, config.columns, config.seed)


def listing_of(seeds: Seeds, asking: Asking, models: ModelPair, config: GraftConfig) -> Listing:
    """How the teacher's base is asked for prompts like these; what ``models`` have of weights is not used.

    Raises:
        TextError: the examples are too long. PlanError: fewer prompts are asked for than are needed.
    """
    if len(asking.fitting(seeds.prompts, models)) < len(seeds.texts):
        raise TextError(
            "an example is longer than the models read, with the answer",
            where=f"--seeds {seeds.name}",
            fix="give shorter examples, lower --max-new-tokens, or raise --max-length",
        )
    if config.prompts_to_make < LEAST_PROMPTS:
        raise PlanError(
            "too few prompts to learn from and be judged by",
            where="--make-prompts, --max-prompts",
            expected=f"at least {LEAST_PROMPTS}",
            found=config.prompts_to_make,
        )
    return Listing.of(asking.templates.teacher, seeds, asking.limit(models.teacher))


def prompts_from(  # the examples, how they are asked about and of whom; the rest tells stores apart
    seeds: Seeds, asking: Asking, models: ModelPair, config: GraftConfig, run: Run, *, key: str
) -> tuple[list[Prompt], MadePrompts]:
    """Prompts like the examples, written by the teacher's base without the module.

    Args:
        key: of the examples and settings; names the file that the base's words are kept in (``run.work``).

    Raises:
        TextError: too few could be made. ModelError: the teacher does not speak.
    """
    with run.stage(STAGE):
        listing = listing_of(seeds, asking, models, config)
        model = language_model(models.teacher, bf16=asking.bf16)
        key = json.dumps([key, models.teacher.speaking_key, listing.examples, listing.tokens])
        return make_prompts(
            seeds,
            listing.writer(model, config.seed),
            config.prompts_to_make,
            least=LEAST_PROMPTS,
            seed=config.seed,
            store=AnswerStore(run.work, "made-prompts", key) if run.work else None,
            progress=lambda done, total: run.progress(STAGE, done, total),
        )
