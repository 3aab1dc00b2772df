"""Broken and hostile files: mutants of a corpus of every kind, read and planned with.

    python tests/mutants.py --count 100000                # as many as one likes, of reading and planning
    python tests/mutants.py --transfers --count 500       # the same through whole transfers
    python tests/mutants.py --seed 0 --only 4711          # one again, with its traceback

A mutant may be read or refused by an error of ours, on one line. Anything else is a fault: another exception, more than
ten seconds, a file written, a host looked up, an object made by an unrestricted pickle. The same seed and number make
the same mutant.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

# A base that a mutant names is not to be looked for.
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from safetensors.torch import load_file, save

import tiny
from peft_graft import Graft, GraftConfig
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.alignment.text import read_text
from peft_graft.checkpoints.convert import stand_in
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import GraftError
from peft_graft.models.loading import ModelHandle, ModelPair, blank_handle, load_config
from peft_graft.models.spaces import Space
from peft_graft.models.task_models import quiet_libraries
from peft_graft.planning.plan import Plan
from peft_graft.prompts.read import PromptSource
from peft_graft.study.read_study import read_study

SLOW = 10.0
MODELS, ALIGNMENTS = ("bert", "llama"), ("prune-align", "ridge")
_TAGS = {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}
_WORDS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 2}
_PROMPT = {"task_type": "TOKEN_CLS", "num_virtual_tokens": 3}
#: Name -> base model, configuration of peft, and how it is saved.
PEFT: Mapping[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": (
        "bert",
        peft.LoraConfig(**_TAGS, r=2, rank_pattern={"value": 3}, alpha_pattern={r"layer\.[01]\..*query": 3}),
        {},
    ),
    "lora.bin": ("bert", peft.LoraConfig(**_TAGS, r=2), {"safe_serialization": False}),
    "dora": ("bert", peft.LoraConfig(**_TAGS, r=2, use_dora=True, bias="lora_only"), {}),
    "whole vocabulary": ("llama", peft.LoraConfig(**_WORDS, modules_to_save=["embed_tokens", "lm_head"]), {}),
    "some tokens": ("llama", peft.LoraConfig(**_WORDS, trainable_token_indices=[5, 9]), {}),
    "embeddings": ("llama", peft.LoraConfig(**{**_WORDS, "target_modules": ["embed_tokens", "q_proj"]}), {}),
    "ia3": (
        "bert",
        peft.IA3Config(
            task_type="TOKEN_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
        ),
        {},
    ),
    "norms": ("bert", peft.LNTuningConfig(task_type="TOKEN_CLS", target_modules=["LayerNorm"]), {}),
    "prompt.bin": ("bert", peft.PromptTuningConfig(**_PROMPT), {"safe_serialization": False}),
    "p-tuning": ("bert", peft.PromptEncoderConfig(**_PROMPT, encoder_hidden_size=8), {}),
    "prefix": ("bert", peft.PrefixTuningConfig(**_PROMPT), {}),
    "loha": ("bert", peft.LoHaConfig(**_TAGS, r=2, rank_pattern={"query": 1}), {}),
    "vera": ("bert", peft.VeraConfig(**_TAGS, r=2), {}),
}
#: Name -> settings, head, and how it is saved.
HUB: Mapping[str, tuple[str, str | None, dict[str, Any]]] = {
    "seq_bn": ("seq_bn", "tagging", {}),
    "par_bn": ("par_bn[use_gating=True]", "classification", {"use_safetensors": True}),
    "compacter": ("compacter[phm_dim=2,reduction_factor=4]", None, {}),
    "invertible": ("seq_bn_inv", None, {}),
    "hub lora": ("lora", "classification", {}),
    "hub ia3": ("ia3", None, {}),
    "hub prefix": ("prefix_tuning[prefix_length=3,bottleneck_size=4]", None, {}),
}
_STUDY = """
name = "small"
[models]
A = "./bert"
B = "owner/model"
[tasks.ner]
kind = "token-classification"
train = "./train.jsonl"
test = "./test.jsonl"
languages = ["en", "de"]
[tasks.speak]
kind = "generation"
train = "./train.jsonl"
test = "./test.jsonl"
format = "Q: {prompt} A:"
[modules.lora]
config = { peft_type = "LORA", r = 4 }
[training.student]
epochs = 2
[defaults]
budgets = [0, 100]
[[grid]]
teacher = "A"
student = "B"
modules = ["lora"]
tasks = ["ner"]
methods = ["auto", "copy"]
"""


# ---- the corpus ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A folder of files that are well, what reads them, and whether that writes files of its own."""

    name: str
    folder: Path
    read: Callable[[Path], object]
    writes: bool = False


def make(root: Path) -> None:
    """Models, and a folder of every kind."""
    tiny.base_model(root / "bert", layers=2, hidden=16, heads=2, ffn=24)
    words = transformers.LlamaConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    tiny.saved(root / "llama", words)
    for name in PEFT:
        _peft(root, name)
    for name, (settings, head, how) in HUB.items() if tiny.HAS_ADAPTERS else ():
        tiny.adapterhub_module(root / name, root / "bert", settings, head=head, **how)
    (root / "text.txt").write_text("\n".join(tiny.sentences(60)))
    tiny.transfer(root / "lora", root / "bert", method="copy", out=root / "graft")
    _alignments(root)
    (root / "study").mkdir()
    (root / "study" / "study.toml").write_text(_STUDY)
    _texts(root / "texts")
    for name in MODELS:
        (root / "models" / name).mkdir(parents=True)
        shutil.copy(root / name / "config.json", root / "models" / name)


def corpus(root: Path) -> list[Item]:
    """The folders that ``make`` made, and what reads each."""
    modules = [*PEFT, *(HUB if tiny.HAS_ADAPTERS else ())]
    return [
        *(Item(name, root / name, partial(_plan, root)) for name in modules),
        Item("graft", root / "graft", lambda folder: Graft.from_pretrained(folder, student=root / "bert")),
        *(Item(name, root / name, Alignment.from_pretrained) for name in ALIGNMENTS),
        Item("study", root / "study", lambda folder: read_study(folder / "study.toml")),
        Item("texts", root / "texts", _read_texts),
        *(Item(name, root / "models" / name, partial(_plan_onto, root)) for name in MODELS),
    ]


def _peft(root: Path, name: str) -> None:
    base, config, how = PEFT[name]
    if base == "bert":
        model = tiny.task_model(root / base)
    else:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(root / base, tie_word_embeddings=False)
        )
        model.config._name_or_path = model.name_or_path = str(root / base)
    adapted = peft.get_peft_model(model, config)
    tiny.randomise_trained(adapted, 1)
    adapted.save_pretrained(root / name, **how)
    (root / name / "README.md").unlink()
    labels = {"id2label": {str(number): label for number, label in enumerate(tiny.LABELS)}}
    (root / name / "config.json").write_text(json.dumps({"model_type": "bert", **labels}))


def _alignments(root: Path) -> None:
    pairs = [(Space(layer, "attn.in"), Space(layer, "attn.in")) for layer in range(2)]
    chosen = Selection(torch.tensor([2, 0, -1]), 4)
    mixed = LinearMap(torch.rand(4, 3), torch.rand(3, 4), torch.rand(4))
    for method, space_map in zip(ALIGNMENTS, (chosen, mixed), strict=True):
        made = Alignment(method, "a", "b", dict.fromkeys(pairs, space_map), {pairs[0]: {"mean_correlation": 0.5}})
        made.save_pretrained(root / method)


def _texts(folder: Path) -> None:
    folder.mkdir()
    rows = [{"prompt": "say it", "completion": "it"}, {"messages": [{"role": "user", "content": "who"}]}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    (folder / "rows.csv").write_text("text,label\none,1\ntwo,2\n")
    (folder / "lines.txt").write_text("one\ntwo\n")


# ---- what reads them -------------------------------------------------------------------------------------------------


@cache
def _handle(folder: Path) -> ModelHandle:
    return blank_handle(load_config(str(folder)), str(folder))


def _plan(root: Path, folder: Path) -> None:
    """A module read and its transfer planned, as ``inspect`` does."""
    raw = read_checkpoint(folder)
    assert raw.num_parameters >= 0
    own = {str(root / name) for name in ("bert", "llama")}
    teacher = Path(raw.base_model) if raw.base_model in own else None
    if teacher is None:  # another base than before: what a stranger's file makes us look for
        if raw.base_model:
            _no_model(raw.base_model)
        teacher = root / "bert"
    models = ModelPair(_handle(teacher), _handle(teacher))
    shapes = stand_in(raw, models.teacher.base.config) if raw.needs_conversion else raw
    Plan.make(shapes, models, GraftConfig(method="copy"))


def _no_model(name: str) -> None:
    try:
        load_config(name)
    except GraftError:
        return


def _plan_onto(root: Path, folder: Path) -> None:
    """A model's configuration as the student's."""
    student = blank_handle(load_config(str(folder)), str(folder))
    Plan.make(_raw(root / "lora"), ModelPair(_handle(root / "bert"), student), GraftConfig(method="prune-align"))


@cache
def _raw(folder: Path) -> Any:
    return read_checkpoint(folder)


def _read_texts(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        try:
            source = PromptSource.of(path)
            list(islice(source.prompts() if source else read_text(path), 50))
        except GraftError as error:
            if bad := _bad_line(error):
                raise ValueError(bad) from error


# ---- mutations -------------------------------------------------------------------------------------------------------

_BOMB = "(([a-z]+)*|.)*(a|b|ab)*(x+x+)+y"
_ESCAPES = "\x1b]0;owned\x07\x1b[31m[bold red]\n| `x` | <script>\u202e\\"
VALUES: tuple[Callable[[random.Random], Any], ...] = (
    *(partial(lambda value, _: copy.deepcopy(value), value) for value in (
        None, True, False, 0, 1, -1, 3, 2**31, 2**70, 1.5, 1e308, -0.0, "", "x", "0", "\x00", "../..", "/", "a" * 5000,
        [], {}, [None], [[]], {"": ""}, {"0": 1}, [1, "a"], _BOMB, [_BOMB], {_BOMB: 1}, _ESCAPES, {_ESCAPES: _ESCAPES},
        "\ud800", "http://127.0.0.1:1/x", "NONE", "LORA", "bert", "torch.nn", float("nan"), float("inf"),
    )),
    lambda rng: {f"layer.{rng.randrange(9)}.{name}": name for name in range(3000)},
    lambda rng: [f"name{rng.random()}" for _ in range(3000)],
    lambda rng: json.loads("[" * 90 + "]" * 90) if rng.random() < 0.5 else json.loads('{"a":' * 90 + "1" + "}" * 90),
)  # fmt: skip
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.int32,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one or several files of a folder in place; says how."""
    return ", ".join(_mutate_file(folder, rng) for _ in range(1 + (rng.random() < 0.25)))


def _mutate_file(folder: Path, rng: random.Random) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not files:
        return "nothing left"
    path = rng.choice(files)
    if rng.random() < 0.06:
        return f"{path.name}: {rng.choice(FILES)(path, rng)}"
    if path.suffix == ".json" and rng.random() < 0.9:
        return f"{path.name}: {_mutate_json(path, rng)}"
    if path.suffix in (".safetensors", ".bin") and rng.random() < 0.85:
        return f"{path.name}: {_mutate_tensors(path, rng)}"
    return f"{path.name}: {_mutate_bytes(path, rng)}"


def _mutate_json(path: Path, rng: random.Random) -> str:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return _mutate_bytes(path, rng)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    if isinstance(content, dict | list):
        walk(content)
    if not places or rng.random() < 0.03:
        made = rng.choice(VALUES)(rng)
        path.write_text(json.dumps(made))
        return f"all is {str(made)[:40]!r}"
    holder, key = rng.choice(places)
    how = rng.choice(["value"] * 6 + ["delete", "rename", "wrap", "text", "swap", "add"])
    value = rng.choice(VALUES)(rng)
    if how == "delete":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[str(value)[:5000]] = holder.pop(key)
    elif how == "wrap":
        holder[key] = rng.choice([[holder[key]], {"0": holder[key]}, [holder[key]] * 2])
    elif how == "text":
        holder[key] = str(holder[key])
    elif how == "swap":
        other, elsewhere = rng.choice(places)
        if elsewhere in (other if isinstance(other, dict) else range(len(other))):
            with suppress(RecursionError):  # what an earlier mutation has nested too deep to be copied stays
                holder[key] = copy.deepcopy(other[elsewhere])
    elif how == "add" and isinstance(holder, dict):
        options = ("alpha_pattern", "exclude_modules", "use_dora", "bias", "x", "layers_pattern", "leave_out", "flat")
        holder[rng.choice(options)] = value
    else:
        holder[key] = value
    try:
        path.write_text(json.dumps(content))
    except (ValueError, RecursionError):  # a value was put into itself
        return _mutate_bytes(path, rng)
    return f"{how} {key} {str(value)[:40]!r}"


def _tensors(path: Path) -> dict[Any, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def _mutate_tensors(path: Path, rng: random.Random) -> str:
    try:
        tensors = _tensors(path)
        named = {name: value for name, value in tensors.items() if isinstance(name, str)}
        key = rng.choice(sorted(name for name, value in named.items() if isinstance(value, torch.Tensor)))
    except Exception:  # an earlier mutation left nothing to load
        return _mutate_bytes(path, rng)
    how = rng.choice(sorted(TENSORS))
    if path.suffix == ".bin" and rng.random() < 0.4:
        how = rng.choice(sorted(PICKLES))
        try:
            torch.save(PICKLES[how](tensors, key), path, _use_new_zipfile_serialization=rng.random() < 0.8)
        except (RuntimeError, TypeError, NotImplementedError):  # of a tensor that is odd already
            return _mutate_bytes(path, rng)
        return how
    try:
        TENSORS[how](tensors, key, rng)
    except (RuntimeError, TypeError, NotImplementedError):  # of a tensor that is odd already
        tensors.pop(key)
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        path.write_bytes(save({name: value.contiguous().clone() for name, value in tensors.items()}))
    return f"{how} {key}"


def _of(change: Callable[[torch.Tensor, random.Random], torch.Tensor]) -> Callable[..., None]:
    def changed(tensors: dict[Any, torch.Tensor], key: str, rng: random.Random) -> None:
        tensors[key] = change(tensors[key], rng)

    return changed


def _renamed(tensors: dict[Any, torch.Tensor], key: str, rng: random.Random) -> None:
    parts = key.split(".")
    place = rng.randrange(len(parts))
    more = ["0", "999", "x", "", "weight", "lora_A", "\x1b[31m", "a" * 3000]
    other = ["7", "-1", "²", "lm_head", "dense", "default"]
    made: str = rng.choice(
        [
            ".".join([*parts[:place], *parts[place + 1 :]]),
            ".".join([*parts[:place], rng.choice(more), *parts[place:]]),
            ".".join([*parts[:place], rng.choice(other), *parts[place + 1 :]]),
            *("", "x", key.upper(), key[::-1], f"unet.{key}", f"{key}.default.weight"),
        ]
    )
    tensors[made] = tensors[key].clone() if rng.random() < 0.3 else tensors.pop(key)


def _all_of(dtype: torch.dtype, tensors: dict[Any, torch.Tensor], _: str, __: random.Random) -> None:
    tensors.update({name: value.to(dtype) for name, value in tensors.items() if isinstance(value, torch.Tensor)})


TENSORS: Mapping[str, Callable[..., None]] = {
    "dtype": _of(lambda value, rng: value.to(rng.choice(DTYPES))),
    "integers": partial(_all_of, torch.int8),
    "half": partial(_all_of, torch.float16),
    "transpose": _of(lambda value, _: value.T.contiguous() if value.ndim == 2 else value[None]),
    "longer": _of(lambda value, _: torch.cat([value, value]) if value.ndim else value[None]),
    "shorter": _of(lambda value, _: value[:-1] if value.ndim else value),
    "empty": _of(lambda value, _: torch.zeros(0)),
    "no rows": _of(lambda value, _: value[:0] if value.ndim else value),
    "number": _of(lambda value, _: value.flatten()[0] if value.numel() else value),
    "flat": _of(lambda value, _: value.flatten()),
    "deep": _of(lambda value, _: value[None, None, ..., None]),
    "nan": _of(lambda value, _: value * float("nan")),
    "inf": _of(lambda value, _: value / 0),
    "huge": _of(lambda value, _: torch.full_like(value, 1e38) if value.dtype == torch.float32 else value),
    "zero": _of(lambda value, _: torch.zeros_like(value)),
    "delete": lambda tensors, key, _: tensors.pop(key),
    "all but one": lambda tensors, key, _: [tensors.pop(name) for name in list(tensors) if name != key],
    "none": lambda tensors, *_: tensors.clear(),
    "rename": _renamed,
    "swap": lambda tensors, key, rng: tensors.update({key: tensors[rng.choice(sorted(tensors))].clone()}),
}


class _Code:
    """Runs code when it is loaded by pickle."""

    def __reduce__(self) -> Any:
        return os.getenv, ("HOME",)


def _with(tensors: dict[Any, Any], key: Any, value: Any) -> dict[Any, Any]:
    return {**tensors, key: value}


PICKLES: Mapping[str, Callable[[dict[Any, Any], str], object]] = {
    "code": lambda tensors, key: _with(tensors, key, _Code()),
    "nested": lambda tensors, _: {"model": tensors, "optimizer": {"lr": 1e-3}, "epoch": 3},
    "list": lambda tensors, _: list(tensors.values()),
    "tensor": lambda tensors, key: tensors[key],
    "numbered": lambda tensors, _: dict(enumerate(tensors.values())),
    "tuple key": lambda tensors, key: _with(tensors, (1, 2), tensors[key]),
    "none key": lambda tensors, key: _with(tensors, None, tensors[key]),
    "stride 0": lambda tensors, key: _with(tensors, key, torch.as_strided(torch.ones(1), (16000, 16000), (0, 0))),
    "overlapping": lambda tensors, key: _with(tensors, key, torch.as_strided(torch.ones(9), (5, 5), (1, 1))),
    "meta": lambda tensors, key: _with(tensors, key, torch.empty(4, 4, device="meta")),
    "sparse": lambda tensors, key: _with(tensors, key, torch.eye(4).to_sparse()),
    "csr": lambda tensors, key: _with(tensors, key, torch.eye(4).to_sparse_csr()),
    "quantised": lambda tensors, key: _with(
        tensors, key, torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    ),
    "parameter": lambda tensors, key: _with(tensors, key, torch.nn.Parameter(tensors[key].float())),
    "text": lambda tensors, key: _with(tensors, key, "text"),
    "number": lambda tensors, key: _with(tensors, key, 3),
    "itself": lambda tensors, _: tensors,
}


def _mutate_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "insert", "zero", "deep", "repeat", "other"])
    place = rng.randrange(len(content) + 1)
    if how == "flip" and content:
        for _ in range(rng.choice([1, 1, 4, 50])):
            content[rng.randrange(min(len(content), rng.choice([8, 400, 10**9])))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = rng.choice([b"\xff\xfe", b"\x00" * 9, b'"', b"{", b"9" * 5000, b"\xef\xbb\xbf", b"[["])
    elif how == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif how == "deep":
        content = bytearray(rng.choice([b"[" * 5000, b'{"a":' * 3000, b"[" * 900 + b"]" * 900, b"a = " + b"[" * 3000]))
    elif how == "repeat":
        content = content * 2
    else:
        content = bytearray(
            rng.choice([b"", b"GGUF\3", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"PK\3\4"])
        )
    path.write_bytes(content)
    return how


def _as_folder(path: Path, _: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "is a folder"


def _as_link(path: Path, rng: random.Random) -> str:
    target = rng.choice([path.name, "/etc/passwd", "/dev/zero", "/nowhere", "..", "/dev/fd/0"])
    path.unlink()
    path.symlink_to(target)
    return f"links to {target}"


def _moved(path: Path, rng: random.Random) -> str:
    names = ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json", "pytorch_adapter.bin", "x.gguf",
             "adapter.safetensors", "head_config.json", "alignment.json")  # fmt: skip
    name = rng.choice(names)
    path.replace(path.with_name(name)) if not path.with_name(name).is_dir() else None
    return f"is {name}"


def _gone(path: Path, _: random.Random) -> str:
    path.unlink()
    return "is gone"


FILES: tuple[Callable[[Path, random.Random], str], ...] = (_as_folder, _as_link, _moved, _gone)


# ---- what must not happen --------------------------------------------------------------------------------------------

_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo",
              "pickle.find_class",
              "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "shutil.")  # fmt: skip
#: What Python and ``datasets`` keep for themselves.
_ALLOWED = ("__pycache__", os.devnull, "huggingface/datasets")
_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None or not event.startswith(("open", *_FORBIDDEN)):
        return
    if any(place in str(arguments[:1]) for place in _ALLOWED):
        return
    if event == "open":
        path, mode, flags = arguments
        if (mode and set(str(mode)) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _watched.append(f"writes {path}")
    elif event.startswith(_FORBIDDEN):
        _watched.append(f"{event} {arguments[:2]}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens that reading must not do."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


def _bad_line(error: GraftError) -> str | None:
    """Why a message is not what people can read, None where it is."""
    said = str(error)
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in said):
        return f"codes in {said[:200]!r}"
    return f"{len(said)} characters" if len(said) > 6_000 else None


def fault(item: Item, folder: Path) -> str | None:
    """What goes wrong that must not, in one line; None where a mutant is read, or refused as it should be."""
    begun = time.monotonic()
    with watched() as seen, warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        try:
            item.read(folder)
        except GraftError as error:
            if bad := _bad_line(error):
                return bad
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "peft_graft" in frame.filename] or frames
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            return f"{type(error).__name__} at {place}: {str(error)[:100]!r}"
    if seen := [event for event in seen if not (item.writes and event.startswith(("writes", "os.", "shutil.")))]:
        return seen[0]
    return f"{time.monotonic() - begun:.0f} s" if time.monotonic() - begun > SLOW else None


def mutant(items: list[Item], seed: int, number: int, place: Path) -> tuple[Item, str]:
    """The mutant of a number, in ``place``, which is emptied before; what it is of, and how it was changed."""
    rng = random.Random(f"{seed} {number}")
    item = rng.choice(items)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(item.folder, place)
    return item, mutate(place, rng)


def faults(items: list[Item], numbers: Iterator[int], seed: int, place: Path) -> Iterator[tuple[int, str, str, str]]:
    """Number, item, mutation and fault of the mutants that go wrong."""
    with quiet_libraries():  # once for all, for every change of a logger's level takes long
        for done, number in enumerate(numbers):
            if done % 20 == 0:
                faulthandler.dump_traceback_later(6 * SLOW, exit=True)  # for what hangs where no signal reaches it
            item, how = mutant(items, seed, number, place)
            if found := fault(item, place):
                yield number, item.name, how, found
    faulthandler.cancel_dump_traceback_later()


def _transfers(root: Path, items: list[Item]) -> list[Item]:
    """Items whose files go through a whole transfer."""

    def moved(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            options = {"text": root / "text.txt", "method": "prune-align", "polish": 2}
            tiny.transfer(folder, root / "bert", out=Path(out) / "out", **options)

    names = {*PEFT, *HUB}
    return [Item(item.name, item.folder, moved, writes=True) for item in items if item.name in names]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Try mutants; says which go wrong, and how often."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--start", type=int, default=0)
    options.add_argument("--only", type=int)
    options.add_argument("--transfers", action="store_true")
    options.add_argument("--corpus", type=Path, help="keep what is mutated in this folder, and take it from there")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, quiet_libraries():
        root = chosen.corpus or Path(name)
        if not (root / "models").exists():
            make(root)
        items = _transfers(root, corpus(root)) if chosen.transfers else corpus(root)
        if chosen.only is not None:
            item, how = mutant(items, chosen.seed, chosen.only, root / "mutant")
            _say(f"{item.name}: {how}")
            item.read(root / "mutant")
            return 0
        begun, kinds = time.monotonic(), dict[str, list[int]]()
        numbers = iter(range(chosen.start, chosen.start + chosen.count))
        for number, of, how, found in faults(items, numbers, chosen.seed, root / "mutant"):
            key = found.partition(": ")[0]
            if key not in kinds:
                _say(f"{number} {of}: {how}\n    {found}")
            kinds.setdefault(key, []).append(number)
        for key, where in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
            _say(f"{len(where):6} {key}: {', '.join(map(str, where[:5]))}")
        _say(f"{sum(map(len, kinds.values()))} of {chosen.count} in {time.monotonic() - begun:.0f} s")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main())
