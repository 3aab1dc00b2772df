"""The matrix of architectures and kinds of modules: what holds in every cell, found by trying it.

    python tests/matrix.py            # tries every cell, writes docs/matrix.md anew, says which cells changed

``test_matrix.py`` tries some cells of every row and of every column (``chosen``) and compares them with what is written
there.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel

import tiny
from families import DECODERS, ENCODER_DECODERS, ENCODERS, MIXTURES, TOWERS
from peft_graft.alignment.activations import pad
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.verify import probe
from peft_graft.errors import GraftError
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import describe_config, load_model, wrap_model
from peft_graft.models.spaces import Site
from peft_graft.models.task_models import quiet_libraries, shared_copy
from permutation import permuted

PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
EXACT, ACTS = "exact", "acts"
#: Families whose tables of positions are computed, not stored, so that no copy with units in another order exists.
SINUSOIDAL = ("m2m_100",)
#: Families whose feed-forward block has ReLU.
RELU = ("opt", "t5", "pegasus", "marian", "m2m_100", "mbart", "bart")
_TASK = {"task_type": "FEATURE_EXTRACTION"}


def architectures() -> dict[str, Any]:
    """Name -> small configuration, of every family that the tests know."""
    found = {family: tiny.config(family, layers=2, hidden=40 if family == "mpnet" else 32) for family in tiny.FAMILIES}
    found |= ENCODERS | DECODERS | ENCODER_DECODERS | MIXTURES | TOWERS
    for name, config in found.items():
        if hasattr(config, "relative_attention_num_buckets") and name != "mpnet":  # 32 is the hidden size here
            changed = {**config.to_dict(), "relative_attention_num_buckets": 16}
            found[name] = type(config)(**changed)
    return found


def _paths(architecture: Architecture, *roles: str) -> list[str]:
    """Paths of these roles in all stacks and layers; experts are left to their own tests."""
    return sorted(
        {
            architecture.path(Site(layer, stack.full(role)))
            for stack in architecture.row.stacks
            for role in roles
            if role in stack.places
            for layer in range(architecture.depths[stack.name])
            if architecture.has(Site(layer, stack.full(role)))
        }
    )


def _lora(architecture: Architecture, **options: Any) -> peft.PeftConfig:
    # A unit of ReLU that never fires on the text cannot be told from others, and wakes when the module changes its
    # input: what reads such units moves well, but not exactly.
    reading = () if architecture.model_type in RELU else ("ffn.down",)
    paths = _paths(architecture, "attn.query", "attn.value", "ffn.up", *reading, "cross.value")
    return peft.LoraConfig(r=4, target_modules=paths, fan_in_fan_out=architecture.transposed, **options)


def _ia3(architecture: Architecture) -> peft.PeftConfig:
    inputs = _paths(architecture, "ffn.down")
    return peft.IA3Config(
        target_modules=[*_paths(architecture, "attn.key", "attn.value"), *inputs], feedforward_modules=inputs,
        fan_in_fan_out=architecture.transposed,
    )  # fmt: skip


def _norms(architecture: Architecture) -> peft.PeftConfig:
    known = [path for stack in architecture.row.stacks for path in _paths(architecture, *stack.norms)]
    known += architecture.norms.values()
    # Where no norm's role is known, any will do to see why it is refused.
    unknown = r".*\.(layer_?norm1?|ln_?1?|LayerNorm|self_attn_layer_norm)"
    return peft.LNTuningConfig(target_modules=known or unknown)


def _virtual(kind: Any, architecture: Architecture, **options: Any) -> peft.PeftConfig:
    own = {}
    if architecture.model_type == "distilbert":  # peft does not know its names for these
        own = {"token_dim": architecture.hidden_size, "num_layers": architecture.num_layers, "num_attention_heads": 4}
    return kind(**_TASK, num_virtual_tokens=3, **own, **options)


def _weights(kind: Any, architecture: Architecture, **options: Any) -> peft.PeftConfig:
    return kind(target_modules=_paths(architecture, "attn.query", "attn.value"), **options)


#: Word embeddings of models with several stacks, which have no role.
_WORDS = {"whisper": "decoder.embed_tokens"} | dict.fromkeys(("clip", "siglip"), "token_embedding")


def _words(architecture: Architecture) -> str:
    if all(stack.kind == "vision" for stack in architecture.row.stacks):
        raise ValueError("the model reads no text")
    return architecture.vocabulary.get("embed") or _WORDS.get(architecture.model_type, "shared")


def _rows(architecture: Architecture) -> peft.PeftConfig:
    return _lora(architecture, modules_to_save=[_words(architecture).rpartition(".")[2]])


def _embeddings(architecture: Architecture) -> peft.PeftConfig:
    config = _lora(architecture)
    config.target_modules = {*config.target_modules, _words(architecture)}
    return config


Make = Callable[[Architecture], peft.PeftConfig]
PEFT_KINDS: Mapping[str, Make] = {
    "LoRA": _lora,
    "rsLoRA": partial(_lora, use_rslora=True, lora_alpha=4),
    "DoRA": partial(_lora, use_dora=True),
    "LoRA, bias of B": partial(_lora, lora_bias=True),
    "LoRA, layers' biases": partial(_lora, bias="lora_only"),
    "LoRA, on embeddings": _embeddings,
    "LoRA, embeddings trained": _rows,
    "IA3": _ia3,
    "LN tuning": _norms,
    "prompt": partial(_virtual, peft.PromptTuningConfig),
    "p-tuning": partial(_virtual, peft.PromptEncoderConfig, encoder_hidden_size=16),
    "prefix": partial(_virtual, peft.PrefixTuningConfig),
    "LoHa": partial(_weights, peft.LoHaConfig, r=2),
    "VeRA": partial(_weights, peft.VeraConfig, r=4),
}
HUB_KINDS = {
    "Pfeiffer": "seq_bn",
    "parallel": "par_bn",
    "AdapterHub LoRA": "lora",
    "AdapterHub IA3": "ia3",
    "AdapterHub prefix": "prefix_tuning_flat",
}
HAS_ADAPTERS = importlib.util.find_spec("adapters") is not None
KINDS = (*PEFT_KINDS, *HUB_KINDS)


class World:
    """One architecture: a model, a copy with its units in another order, and the alignment of the two."""

    def __init__(self, name: str, config: Any, root: Path) -> None:
        self.name, self.root = name, root
        self.architecture = describe_config(config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tiny.lively(transformers.AutoModel.from_config(config))
        self.base, self.student = root / "base", root / "student"
        model.save_pretrained(self.base)
        tiny.tokenizer(self.base)
        handle = load_model(str(self.base), tokenizer=self.architecture.row.reads_text)
        # Of text models on text: a unit that never fired while aligning cannot be told from others that did not.
        rows = [{"input_ids": ids} for ids in (handle.tokenizer or _no_text)(tiny.sentences(8, seed=99))["input_ids"]]
        self.probe = pad(handle, rows, handle.base.device) if rows else probe(handle)
        self.alignment, self.stream = None, None
        if self.architecture.row.reads_text and name not in SINUSOIDAL:
            other, self.stream = permuted(model)
            other.save_pretrained(self.student)
            tiny.tokenizer(self.student)
            (root / "text.txt").write_text("\n".join(tiny.sentences(60)))
            roles = [role for role in self.architecture.row.linears if "expert" not in role]
            self.alignment = tiny.align(
                self.base, self.student, text=root / "text.txt", sites=[*roles, "adapter", "prompt"]
            )
        else:
            self.student = self.base
        # In memory, for loading them takes longer than anything else here.
        self.teacher, self.receiver = (
            transformers.AutoModel.from_pretrained(path) for path in (self.base, self.student)
        )

    def cell(self, kind: str) -> str:
        """``exact``, ``acts`` or why not."""
        folder, out = self.root / "module", self.root / "graft"
        try:
            expected = self._trained(kind, folder)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError) as error:
            library = "adapters" if kind in HUB_KINDS else "peft"
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"{library} has none: {line}"
        try:
            tiny.transfer_live(
                folder, self.teacher, self.receiver, alignment=self.alignment, out=out, force=True,
                method="auto" if self.alignment else "copy",
            )  # fmt: skip
        except GraftError as error:
            return f"refused: {error.message}"
        raw = read_checkpoint(out)
        attached = attach(raw, wrap_model(self.receiver))
        with torch.inference_mode():
            found = self._state(self._loaded(kind, out))
            # What candidates are judged and polished in computes what the library does.
            same = attached.forward(self.probe)[1]
            torch.testing.assert_close(same, found[:, -same.shape[1] :] if found.ndim == 3 else found)
        expected = expected if self.stream is None else expected[..., self.stream]
        scale = expected.abs().max()
        return EXACT if torch.allclose(found, expected, rtol=0, atol=1e-3 * float(scale)) else ACTS

    def _trained(self, kind: str, folder: Path) -> torch.Tensor:
        if kind in HUB_KINDS:
            adapted = tiny.adapterhub_module(folder, self.base, HUB_KINDS[kind], head=None)
        else:
            adapted = peft.get_peft_model(shared_copy(self.teacher), PEFT_KINDS[kind](self.architecture))
            tiny.randomise_trained(adapted, 1)
            adapted.save_pretrained(folder)
        with torch.inference_mode():
            return self._state(adapted.eval())

    def _loaded(self, kind: str, folder: Path) -> Any:
        if kind in HUB_KINDS:
            import adapters

            model = adapters.AutoAdapterModel.from_pretrained(self.student)
            model.load_adapter(str(folder), set_active=True)
            return model.eval()
        return PeftModel.from_pretrained(shared_copy(self.receiver), folder).eval()

    def _state(self, model: Any) -> torch.Tensor:
        """What the model makes of a batch, [..., d]."""
        output = model(**self.probe)
        if "last_hidden_state" in output:
            return output.last_hidden_state
        return torch.cat([output.text_embeds, output.image_embeds], -1)


def _no_text(_: list[str]) -> dict[str, list[list[int]]]:
    return {"input_ids": []}


#: What errors say -> what it means, without what differs between families and tokenizers.
_MEANINGS = {
    r"adapters has none: Unrecognized configuration class.*": "AdapterHub's library has no model of this family",
    r"peft has none: .*forward\(\) got an unexpected keyword argument '(\w+)'": r"the model takes no {1}",
    r"peft has none: .*(object has no attribute 'vocab_size'|the model reads no text)": "the model reads no text",
    r"peft has none: .*(must match|list index|tuple index|provide either|SiglipEncoder).*": "peft's virtual tokens do "
    "not fit this model",
    r"refused: no role is known yet for \S+adapters.*": "refused: the row of this family does not say where "
    "AdapterHub puts its adapters",
    r"refused: the module trains this part of the vocabulary, which has no role.*": "refused: the vocabulary of "
    "models with several stacks is no site (what peft trains at `shared`, neither stack uses)",
    r"refused: no role is known yet for .*norm.*": "refused: the norms of models with several stacks have no roles",
    r"refused: peft loads the module, but the student cannot be run with it.*": "peft's virtual tokens do not fit this "
    "model",
    r"peft has none: Target module of type .*Conv1D.*": "peft has none for transposed layers (Conv1D)",
    r"peft has none: Sizes of tensors must match.*": "peft's virtual tokens do not fit this model",
}


def meaning(outcome: str) -> str:
    """An outcome as the page has it."""
    for pattern, said in _MEANINGS.items():
        if match := re.fullmatch(pattern, outcome):
            return said.replace("{1}", match[1] if match.groups() else "")
    return outcome


def row(name: str, config: Any, kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """Kind -> outcome, of one architecture."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        world = World(name, config, Path(folder))
        return {kind: meaning(world.cell(kind)) for kind in kinds if HAS_ADAPTERS or kind not in HUB_KINDS}


def chosen(rows: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Architecture -> kinds to try: every fourth cell of each row and each column, and every outcome of every kind."""
    picked = {
        name: [kind for column, kind in enumerate(KINDS) if (line + column) % 4 == 0] for line, name in enumerate(rows)
    }
    tried = {(kind, rows[name][kind]) for name, kinds in picked.items() for kind in kinds}
    for name, cells in rows.items():
        for kind, outcome in cells.items():
            if (kind, outcome) not in tried:
                tried.add((kind, outcome))
                picked[name].append(kind)
    return picked


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The matrix as Markdown, reasons as footnotes."""
    notes: dict[str, int] = {}
    lines = [
        "# Architectures and kinds of modules",
        "",
        "Written by `python tests/matrix.py`, which tries every cell; `tests/models/test_matrix.py` tries a part of",
        "them again: every fourth cell of each row and each column, and every outcome of every kind.",
        "Tiny random models.",
        "",
        "- **exact**: on a copy of the model whose hidden units, key-value groups, heads, units of values and FFN",
        "  units are in another order, aligned on text, the moved module computes what the original does (to 1e-3 of",
        "  the largest value). For models that do not read text alone, and for those whose positions are sinusoids:",
        "  on the model itself.",
        "- **acts**: loads in its library and changes the output, but not exactly as the original.",
        "- a number: refused, or not to be had, for the reason below.",
        "",
        f"| architecture | {' | '.join(KINDS)} |",
        f"|---|{'---|' * len(KINDS)}",
    ]
    for name, cells in rows.items():
        shown = [
            cells[kind] if cells[kind] in (EXACT, ACTS) else f"[{notes.setdefault(cells[kind], len(notes) + 1)}]"
            for kind in KINDS
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items()), ""]
    return "\n".join(lines)


def written() -> dict[str, dict[str, str]]:
    """The rows of the page."""
    text = PAGE.read_text()
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.M))
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    names, *body = table
    return {
        cells[0]: {
            kind: notes[cell.strip("[]")] if cell.startswith("[") else cell
            for kind, cell in zip(names[1:], cells[1:], strict=True)
        }
        for cells in body
    }


if __name__ == "__main__":
    found, before = {}, written()
    for name, config in architectures().items():
        found[name] = row(name, config)
        for kind, outcome in found[name].items():
            if before.get(name, {}).get(kind) != outcome:
                sys.stderr.write(f"changed: {name}, {kind}: {before.get(name, {}).get(kind)} -> {outcome}\n")
        sys.stderr.write(f"{name}: {', '.join(sorted(set(found[name].values())))}\n")
    PAGE.write_text(page(found))
