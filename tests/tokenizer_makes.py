"""Small tokenizers of the makes that decoders have, from the words that they know whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from peft_graft.alignment.vocabulary import BYTE_OF

#: The usual shape of a chat template, with the system's turn where there is one.
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is defined and not think %}<think></think>{% endif %}"
    "{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
SPECIALS = ("<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def chain(word: str) -> list[tuple[str, str]]:
    """The merges that make one token of a word, from its left: the last one makes it whole."""
    return [(word[:end], word[end]) for end in range(1, len(word))]


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(merge for word in words for merge in chain(word)))


def _vocabulary(letters: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys([*letters, *(a + b for a, b in merges)]))}


def _fast(
    core: Tokenizer, template: str | None, *, ends: bool = False, added: bool = True
) -> transformers.PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    core.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "\n\n") if added])
    single = "<s> $A </s>" if ends else "<s> $A"
    marks = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def byte_level(
    *words: str, without: int = 0, template: str | None = CHAT, ends: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """As of GPT-2 and Qwen; words are written with ``Ġ`` for a space.

    Args:
        without: how many of the last merges it lacks. ends: whether it ends a text as well as beginning it.
    """
    merges = _merges(words)
    merges = merges[: len(merges) - without]
    core = Tokenizer(models.BPE(_vocabulary(sorted(BYTE_OF), merges), merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _fast(core, template, ends=ends)


def sentencepiece(
    *words: str, prefix: bool = True, metaspace: bool = False, template: str | None = CHAT, added: bool | None = None
) -> transformers.PreTrainedTokenizerFast:
    """As of Llama 2 and Gemma, with a token for every byte; words are written with ``▁`` for a space.

    Args:
        prefix: whether a text is given a space before it, as Llama 2 does. metaspace: as newer files say the same.
        added: whether it has added tokens too, after which a normaliser that puts in a space does so again.
    """
    merges = _merges(words)
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(code) for code in range(33, 127))]
    core = Tokenizer(
        models.BPE(_vocabulary(letters, merges), merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    else:
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(core, template, added=added if added is not None else metaspace or not prefix)


def wordpiece(*words: str) -> transformers.PreTrainedTokenizerFast:
    """As of BERT, cased."""
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(["[UNK]", *words])}))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _fast(core, CHAT)


def word_level(*words: str) -> transformers.PreTrainedTokenizerFast:
    """Words alone, which says nothing about bytes."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(core, CHAT)


def token_texts(tokenizer: transformers.PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def is_contiguous(spans: Sequence[tuple[int, int]]) -> bool:
    return all(first[1] == second[0] for first, second in pairwise(spans))
