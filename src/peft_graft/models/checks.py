"""What is refused of a model before its weights are loaded; what loading raises, in one line that says what to do."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_graft.errors import DependencyError, GraftError, ModelError, reason
from peft_graft.files import read_json
from peft_graft.models.task_models import quiet_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: Layers or experts of a model.
_MOST = 10_000
_CONFIG, _MODULE = "config.json", "adapter_config.json"
#: What repositories of quantised weights call themselves.
_QUANTISED = re.compile(r"(?i)(?<![a-z0-9])(bnb|[48]-?bit|awq|gptq|int[48]|nf4|fp8|gguf)(?![a-z0-9])")


def check_no_module(name: str, source: Mapping[str, Any], role: str) -> None:
    """Refuse what is no model's folder: a trained module, a model with one beside it, a file, an empty folder.

    Where a module lies, transformers loads that module's base in place of the model and puts the module into it.

    Args:
        name: folder or hub id. source: arguments of ``from_pretrained``. role: ``teacher`` or ``student``.

    Raises:
        ModelError: it is such a thing.
    """
    folder = Path(name) / (source.get("subfolder") or "")
    with explained(name, role):  # a name that the file system does not take, or an address
        here = folder.is_dir()
    if not here and (folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        why = "this is a file" if folder.exists() else "there is no folder of this name"
        raise ModelError(
            f"the {role} cannot be loaded: {why}",
            where=name,
            fix=f"{_by(role)}give a model's folder, or a hub id that can be reached from here",
        )
    module, config = (file_of(name, file, source, role) for file in (_MODULE, _CONFIG))
    if module:
        said = read_json(Path(module))
        base = said.get("base_model_name_or_path") or said.get("model_name") or "its base"
        if not config:
            raise ModelError(
                f"the {role} is a trained module, not a model",
                where=name,
                expected=_CONFIG,
                found=_MODULE,
                fix=f"give {base}{_option(role)}; for a model with this module inside, merge it into {base} first "
                "(merge_and_unload, save_pretrained) and give that",
            )
        raise ModelError(
            f"a trained module lies beside the {role}, and transformers would put it into the model",
            where=name,
            found=_MODULE,
            fix="give a folder without it, or the model with the module merged into it (merge_and_unload, "
            "save_pretrained)",
        )
    if folder.is_dir() and not config:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
        raise ModelError(
            f"the {role} cannot be loaded: the folder holds no model",
            where=name,
            expected=_CONFIG,
            found=", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder",
            fix=f"give one of its sub-folders: {', '.join(inside)}" if inside else "save it with save_pretrained",
        )


def file_of(name: str, file: str, source: Mapping[str, Any], role: str) -> str | None:
    """Where a file of a folder or of a repository is on this machine; None where there is none, or no way to it."""
    from transformers.utils import cached_file

    options = {key: source[key] for key in ("revision", "token", "subfolder", "local_files_only") if key in source}
    silent = ("gated_repo", "missing_entries", "connection_errors")
    options |= {f"_raise_exceptions_for_{what}": False for what in silent}
    with explained(name, role):
        found: str | None = cached_file(name, file, **options)
    return found


def check_quantisation(config: PretrainedConfig, chosen: Any, name: str, role: str) -> None:
    """Refuse quantised weights that cannot be loaded here.

    Args:
        config: the model's. chosen: how to quantise it as it is loaded, transformers' object or a dictionary.

    Raises:
        DependencyError: the library that quantised them, or what it needs, is missing.
    """
    own = getattr(config, "quantization_config", None)
    settings = own or chosen
    if settings is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
    try:
        quantiser = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=own is not None)
        quantiser.validate_environment()
    except Exception as error:  # every library has errors of its own here
        raise DependencyError(
            f"the {role}'s weights are quantised by {_text(method)}, and cannot be loaded here ({_said(error)})",
            where=name,
            fix=f"install that library, or give the same model in 16 bit{_option(role)}",
        ) from error


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuse a configuration of more layers or experts than any model has, which would take hours to make.

    Raises:
        ValueError: it is one.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_counts(value)
        elif isinstance(value, int) and value > _MOST and any(part in name for part in ("layer", "expert")):
            raise ValueError(f"{name} is {value}, expected {_MOST} at most")


def check_tokens(
    rows: Iterable[Sequence[int]], embeddings: int | None, tokenizer: PreTrainedTokenizerBase, where: str | None
) -> None:
    """Refuse tokens that a model has no embedding of; ids of its tokenizer that no text has do no harm.

    Args:
        rows: token ids. embeddings: their number, None where it is not known. where: what errors name.

    Raises:
        ModelError: there is such a token.
    """
    highest = max((max(row, default=0) for row in rows), default=0)
    if embeddings is not None and highest >= embeddings:
        raise ModelError(
            f"the tokenizer gives a token that the model has no embedding of, {tokenizer.decode([highest])!r}",
            where=where,
            expected=f"ids below {embeddings}, the number of the model's embeddings",
            found=f"id {highest} of the tokenizer's {len(tokenizer)} tokens",
            fix="put the tokenizer that the model was trained with beside it; where the token was added, resize the "
            "model (resize_token_embeddings) and save it",
        )


@contextmanager
def explained(name: str, role: str) -> Iterator[None]:
    """What libraries raise while they load something, in one line that says what to do.

    Raises:
        ModelError: in place of any error that is not ours.
    """
    if "://" in name:  # transformers would fetch what a module's configuration says, from any host
        raise ModelError(
            f"the {role} is named by an address",
            where=name,
            expected="a folder or a hub id",
            fix=f"give one of these{_option(role)}",
        )
    try:
        with quiet_libraries():
            yield
    except GraftError:
        raise
    except Exception as error:  # also what a model's own code raises
        if "trust_remote_code=True" in str(error):
            raise ModelError(
                f"the {role} needs model code that comes with its repository",
                where=name,
                fix="read that code; if you trust it, --trust-remote-code (trust_remote_code=True) runs it",
            ) from error
        gone = "couldn't connect to" in str(error) and not os.path.exists(name)  # noqa: PTH110 - pathlib fails for long names
        raise ModelError(
            f"the {role} cannot be loaded: there is no folder of this name, and the hub cannot be reached"
            if gone
            else f"the {role} cannot be loaded ({_said(error)})",
            where=name,
            fix=f"{_by(role)}give a folder, or a hub id that can be reached from here{_near(name, gone=gone)}",
        ) from error


def _option(role: str) -> str:
    """How a user names a model of this role."""
    return f" with --{role}" if role in ("teacher", "student") else ""


def _by(role: str) -> str:
    """The same at the beginning of what to do."""
    return f"with --{role}, " if role in ("teacher", "student") else ""


def _near(name: str, *, gone: bool) -> str:
    if os.path.exists(name):  # noqa: PTH110 - pathlib fails for long names
        return ""
    plain = "; the same model in 16 bit does as well" if _QUANTISED.search(name) else ""
    return plain if gone else f"; there is no folder {name}{plain}"


def _text(method: Any) -> str:
    """The name of a way to quantise: an enum's value, or text; bitsandbytes' where the settings leave it out."""
    return str(getattr(method, "value", method) or "bitsandbytes")


def _said(error: BaseException) -> str:
    """What a library says, without transformers' list of all model types."""
    return reason(error).partition(", or contain one of the following strings in its name")[0]
