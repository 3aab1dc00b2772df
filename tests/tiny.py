"""Tiny random models, tokenizers and modules on disk: everything the tests move about is generated here."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

import peft_graft
from peft_graft import Callback

WORDS = [
    "river",
    "mountain",
    "Lisbon",
    "harbour",
    "letter",
    "engine",
    "Maria",
    "winter",
    "Okafor",
    "museum",
    "signal",
    "Tanaka",
    "green",
    "bridge",
    "council",
    "orchestra",
    "northern",
    "Dvorak",
    "window",
    "market",
    "paper",
    "Helsinki",
    "silver",
    "doctor",
    "railway",
    "garden",
    "captain",
    "lantern",
    "meadow",
    "Quito",
    "violin",
    "thunder",
    "republic",
    "Amara",
    "island",
    "copper",
    "teacher",
    "planet",
    "morning",
    "saffron",
    "Bergen",
    "canyon",
    "student",
]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
HAS_ADAPTERS = importlib.util.find_spec("adapters") is not None  # it needs transformers 4
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra")


def sentences(count: int = 400, seed: int = 0) -> list[str]:
    """Random sentences over a small vocabulary, with capitals and punctuation."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        lines.append(" ".join(WORDS[index] for index in picks) + ".")
    return lines


def questions(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Questions, sentences and the only name in each, which is the answer."""
    draw, found = torch.Generator().manual_seed(seed), []
    names = [word for word in WORDS if word[0].isupper()]
    others = [word for word in WORDS if word[0].islower()]
    for number in range(count):
        words = [others[index] for index in torch.randint(len(others), (7,), generator=draw).tolist()]
        words[int(torch.randint(7, (), generator=draw))] = names[number % len(names)]
        found.append((f"{others[number % 5]}?", " ".join(words) + ".", names[number % len(names)]))
    return found


def tokenizer(folder: Path, *, kind: str = "wordpiece") -> transformers.PreTrainedTokenizerFast:
    """Save a fast tokenizer: lower-casing WordPiece, or cased Unigram with the blank in the token.

    Some words are one token and others two; of kind ``words``, which is lower-casing too, all are one.
    """
    fast = _made_tokenizer(kind)
    fast.save_pretrained(folder)
    return fast


def _halves(words: Sequence[str], *, every: int) -> list[str]:
    """Every so manyth word as one piece and the others as two, ``ri ##ver``."""
    cut = [word if index % every == 0 else f"{word[: len(word) // 2]} ##{word[len(word) // 2 :]}"
           for index, word in enumerate(words)]  # fmt: skip
    return sorted({piece for pieces in cut for piece in pieces.split()})


@functools.cache
def _made_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    lower = [word.lower() for word in WORDS]
    if kind == "unigram":
        pieces = [piece.removeprefix("##") if "##" in piece else f"▁{piece}" for piece in _halves(WORDS, every=3)]
        likely = dict.fromkeys([*pieces, "▁", "."], -4.0)
        letters = dict.fromkeys(sorted(set("".join(WORDS))), -9.0)
        table = [*((special, 0.0) for special in SPECIALS), *(letters | likely).items()]
        core = Tokenizer(models.Unigram(table, unk_id=SPECIALS.index("[UNK]")))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        letters = sorted(set("".join(lower)))
        pieces = [*SPECIALS, ".", *letters, *(f"##{letter}" for letter in letters)]
        pieces += _halves(lower, every=1 if kind == "words" else 2)
        vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens(SPECIALS)
    cls, sep = core.token_to_id("[CLS]"), core.token_to_id("[SEP]")
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def config(family: str = "bert", *, layers: int = 4, hidden: int = 32, heads: int = 4, ffn: int = 48, vocab: int = 200):
    """A small configuration of one of ``FAMILIES``, without dropout."""
    common = {"vocab_size": vocab, "max_position_embeddings": 72, "pad_token_id": 0}
    if family == "distilbert":
        return transformers.DistilBertConfig(
            **common, n_layers=layers, dim=hidden, n_heads=heads, hidden_dim=ffn, dropout=0.0, attention_dropout=0.0
        )
    classes = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "xlm-roberta": transformers.XLMRobertaConfig,
        "mpnet": transformers.MPNetConfig,
        "electra": transformers.ElectraConfig,
    }
    extra = {"embedding_size": hidden} if family == "electra" else {}
    return classes[family](
        **common,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=ffn,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **extra,
    )


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that activations differ between units, layers and tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def base_model(folder: Path, family: str = "bert", *, seed: int = 0, tokens: str = "wordpiece", **shape: Any) -> Path:
    """A base model with its tokenizer, saved in ``folder``."""
    return _written(folder, config(family, **shape), transformers.AutoModel, seed, tokens)


def saved(folder: Path, config: Any, auto: Any = transformers.AutoModel, *, seed: int = 0, **changes: Any) -> Path:
    """A random model of a config, some of whose values are changed, and a tokenizer, saved."""
    return _written(folder, type(config)(**{**config.to_dict(), **changes}), auto, seed, "wordpiece")


#: Files of models that were made before, by all that decides what is in them: making one takes longer than writing it.
_MADE: dict[tuple[object, ...], dict[str, bytes]] = {}


def _written(folder: Path, config: Any, auto: Any, seed: int, tokens: str) -> Path:
    made = (auto.__name__, type(config).__name__, config.to_json_string(use_diff=False), seed, tokens)
    if made not in _MADE:
        with tempfile.TemporaryDirectory() as place:
            lively(auto.from_config(config), seed).save_pretrained(place)
            tokenizer(Path(place), kind=tokens)
            _MADE[made] = {file.name: file.read_bytes() for file in Path(place).iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _MADE[made].items():
        (folder / name).write_bytes(content)
    return folder


def task_model(base: str | Path, task: str = "token-classification", labels: Sequence[str] = LABELS) -> Any:
    """The task model of a saved base, with label names."""
    auto = {
        "token-classification": transformers.AutoModelForTokenClassification,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "base": transformers.AutoModel,
    }[task]
    names = {} if task == "base" else {"id2label": dict(enumerate(labels))}
    return auto.from_pretrained(base, **names).eval()


TASK_TYPES = {"token-classification": "TOKEN_CLS", "sequence-classification": "SEQ_CLS", "base": None}


def peft_lora(
    folder: Path,
    base: str | Path,
    *,
    task: str = "token-classification",
    targets: Iterable[str] | str = ("query", "value"),
    seed: int = 1,
    labels: Sequence[str] = LABELS,
    **options: Any,
) -> Any:
    """A "trained" LoRA (random factors and head) saved by peft; returns the adapted teacher."""
    model = task_model(base, task, labels)
    settings = {"r": 4, "lora_alpha": 8, **options}
    target = targets if isinstance(targets, str) else list(targets)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=TASK_TYPES[task], target_modules=target, **settings))
    randomise(adapted, seed, ("lora_", "modules_to_save.default"))
    adapted.save_pretrained(folder)
    return adapted.eval()


def randomise(model: nn.Module, seed: int, parts: Sequence[str]) -> None:
    """Fill the named parts of a model with random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def randomise_trained(model: nn.Module, seed: int) -> None:
    """Random values in all that would be trained; what multiplies stays well above nought."""
    randomise(model, seed, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("magnitude", "ia3_l", "ln_tuning")):
                parameter.abs_().add_(0.5)


def adapterhub_module(
    folder: Path,
    base: str | Path,
    settings: Any = "seq_bn",
    *,
    head: str | None = "tagging",
    seed: int = 1,
    **save: Any,
) -> Any:
    """A "trained" AdapterHub module saved by the library; returns the adapted teacher."""
    import adapters

    model = adapters.AutoAdapterModel.from_pretrained(base)
    model.add_adapter("skill", config=settings)
    if head == "tagging":
        model.add_tagging_head("skill", num_labels=len(LABELS), id2label=dict(enumerate(LABELS)))
    elif head == "classification":
        model.add_classification_head("skill", num_labels=3)
    model.set_active_adapters("skill")
    parts = ("adapters.skill", "loras.skill", "heads.skill", "shared_parameters.skill", "prefix_tunings.skill")
    randomise(model, seed, parts)
    model.save_adapter(str(folder), "skill", with_head=head is not None, **save)
    return model.eval()


def permuted(model: Any, seed: int = 3) -> tuple[Any, dict[str, torch.Tensor]]:
    """A copy of a BERT-like base model that computes the same with hidden units, heads and FFN units permuted.

    Units of a head are permuted within it too, queries with keys; every layer has its own order of heads and units.
    """
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    hidden, heads = other.config.hidden_size, other.config.num_attention_heads
    size = hidden // heads
    stream = torch.randperm(hidden, generator=generator)
    with torch.no_grad():
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            table = getattr(other.embeddings, name)
            table.weight.copy_(table.weight[:, stream])
        _permute_norm(other.embeddings.LayerNorm, stream)
        for layer in other.encoder.layer:
            order = torch.randperm(heads, generator=generator)
            inner = [torch.randperm(size, generator=generator) for _ in range(2)]
            qk = torch.cat([head * size + inner[0] for head in order.tolist()])
            v = torch.cat([head * size + inner[1] for head in order.tolist()])
            ffn = torch.randperm(layer.intermediate.dense.out_features, generator=generator)
            attention = layer.attention
            _permute_linear(attention.self.query, stream, qk)
            _permute_linear(attention.self.key, stream, qk)
            _permute_linear(attention.self.value, stream, v)
            _permute_linear(attention.output.dense, v, stream)
            _permute_linear(layer.intermediate.dense, stream, ffn)
            _permute_linear(layer.output.dense, ffn, stream)
            _permute_norm(attention.output.LayerNorm, stream)
            _permute_norm(layer.output.LayerNorm, stream)
        if getattr(other, "pooler", None) is not None:
            _permute_linear(other.pooler.dense, stream, torch.arange(hidden))
    return other, {"stream": stream}


def _permute_linear(linear: nn.Linear, columns: torch.Tensor, rows: torch.Tensor) -> None:
    linear.weight.copy_(linear.weight[rows][:, columns])
    linear.bias.copy_(linear.bias[rows])


def _permute_norm(norm: nn.LayerNorm, order: torch.Tensor) -> None:
    norm.weight.copy_(norm.weight[order])
    norm.bias.copy_(norm.bias[order])


# ---- the verbs, options by name --------------------------------------------------------------------------------------


class OnProgress(Callback):
    """Calls a function with every (stage, done, total)."""

    def __init__(self, function: Callable[[str, int, int | None], object]) -> None:
        self.function = function

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        self.function(stage, done, total)


def _split(config: type, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A config of those options that are its fields, and the other arguments of the verb."""
    chosen = {name: options.pop(name) for name in list(options) if name in config.model_fields}
    lists = {name: tuple(chosen[name]) for name in ("sites", "columns") if chosen.get(name) is not None}
    progress = options.pop("progress", None)
    if progress:
        options["callbacks"] = [OnProgress(progress)]
    return config(**chosen | lists), options


def _with_short_polish(options: dict[str, Any]) -> dict[str, Any]:
    by_default = options.get("text") is not None and "method" not in options and "alignment" not in options
    return {"polish": 6, **options} if by_default else options


def transfer(adapter: Any, student: Any, **options: Any) -> Any:
    """``peft_graft.transfer`` with the config's fields as arguments; a polish by default is a few steps long."""
    config, others = _split(peft_graft.GraftConfig, _with_short_polish(options))
    return peft_graft.transfer(adapter, student, config=config, **others)


def transfer_live(
    adapter: Any, teacher: Any, student: Any, *, teacher_tokenizer: Any = None, student_tokenizer: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    """``transfer`` between live models."""
    return transfer(adapter, student, teacher=teacher, tokenizers=(teacher_tokenizer, student_tokenizer), **options)


def align(teacher: Any, student: Any, **options: Any) -> Any:
    """``peft_graft.align`` with the config's fields as arguments."""
    config, others = _split(peft_graft.AlignConfig, options)
    return peft_graft.align(teacher, student, config=config, **others)


def inspect(adapter: Any, student: Any = None, **options: Any) -> Any:
    """``peft_graft.inspect`` with the config's fields as arguments."""
    config, others = _split(peft_graft.GraftConfig, _with_short_polish(options))
    return peft_graft.inspect(adapter, student, config=config, **others)


def evenly_deciding_lora(folder: Path, teacher: Path) -> Path:
    """A LoRA whose head, unlike a random one, gives every class its share of ``sentences``."""
    model = peft_lora(folder, teacher)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    batch = tokenizer(sentences(100, seed=3), padding=True, return_tensors="pt")
    head = model.base_model.model.classifier.modules_to_save["default"]
    with torch.inference_mode():
        logits = model(**batch).logits[batch["attention_mask"].bool()]
        head.weight.mul_(4 / logits.std(0).unsqueeze(1))
        head.bias.zero_()
        head.bias.sub_(model(**batch).logits[batch["attention_mask"].bool()].mean(0))
        answers = model(**batch).logits[batch["attention_mask"].bool()].argmax(-1)
    assert torch.bincount(answers, minlength=5).min() > 20
    model.save_pretrained(folder)
    return folder
