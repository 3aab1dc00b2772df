"""Files of every version of AdapterHub's library: read here, they compute what the library computes with them today."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.formats.adapters.versions import VERSION, todays_settings, todays_tensors
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.task import with_task
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import ModelHandle, load_model

IDS = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
SCALES = {"architecture": "lora", "r": 1, "alpha": 3, "composition_mode": "scale", "init_weights": "ia3"}
SETTINGS: Mapping[str, Any] = {
    "lora": {"architecture": "lora", "r": 4, "alpha": 8},
    "ia3": SCALES,
    "bottleneck": "seq_bn[non_linearity='gelu']",
    "houlsby": "double_seq_bn",
    "invertible": "seq_bn_inv",
    "prefix": "prefix_tuning[non_linearity='gelu', prefix_length=4, bottleneck_size=8]",
    "flat": "prefix_tuning_flat[prefix_length=4]",
    "compacter": "compacter[phm_dim=2, reduction_factor=4]",
}
#: Names in a file of today -> those of adapter-transformers 1.
FIRST = {
    "attention.output.adapters": "attention.output.attention_text_task_adapters",
    "output.adapters": "output.layer_text_task_adapters",
    "invertible_adapters": "invertible_lang_adapters",
}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_model(tmp_path_factory.mktemp("versions") / "base", layers=2)


@pytest.fixture(scope="module")
def handle(base: Path) -> ModelHandle:
    return load_model(str(base))


@pytest.fixture(scope="module")
def made(base: Path) -> Callable[[str, str], Path]:
    """A module of a kind as today's library saves it, with a head; every one made once."""

    @functools.cache
    def folder(kind: str, head: str) -> Path:
        place = base.parent / f"{kind}-{head}"
        tiny.adapterhub_module(place, base, SETTINGS[kind], head=head)
        return place

    return folder


def edit(folder: Path, change: Change, name: str = "adapter_config.json") -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def rename(folder: Path) -> None:
    """Keys as adapter-transformers 1 wrote them."""
    file = folder / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    for new, old in FIRST.items():
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    torch.save(tensors, file)


def of_version(version: str | None, **settings: Any) -> Change:
    """A configuration of a version, with some settings as it wrote them."""

    def change(config: dict[str, Any]) -> None:
        config["version"] = version
        if version is None:
            del config["version"]
        config["config"].update(settings)

    return change


def first(config: dict[str, Any]) -> None:
    """A configuration of the first version, which named an invertible part for every adapter."""
    of_version(None, invertible_adapter={"block_type": "nice", "reduction_factor": 2, "non_linearity": "relu"})(config)
    config["config"].pop("inv_adapter"), config["config"].pop("inv_adapter_reduction_factor")
    config.update(type="text_task", model_class="BertModelWithHeads", config_id="9076f36a74755ac4")


def first_of_a_language(config: dict[str, Any]) -> None:
    first(config)
    config["type"] = "text_lang"


def first_with_glow(config: dict[str, Any]) -> None:
    first(config)
    config["config"]["invertible_adapter"]["block_type"] = "glow"


def ours(folder: Path, handle: ModelHandle) -> tuple[RawCheckpoint, torch.Tensor]:
    raw = with_task(read_checkpoint(folder), handle.architecture)
    logits = attach(raw, handle, tuple(raw.labels or ())).forward({"input_ids": IDS})[0]
    assert logits is not None
    return raw, logits


def theirs(folder: Path, base: Path) -> torch.Tensor:
    import adapters

    model = adapters.AutoAdapterModel.from_pretrained(base)
    model.load_adapter(str(folder), set_active=True)
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


FORMS: Mapping[str, tuple[str, Change]] = {
    "lora before its scale": ("lora", of_version("adapters.1.0.1")),
    "lora of a pre-release": ("lora", of_version("adapters.1.1.0.dev0")),
    "lora with its scale": ("lora", of_version("adapters.1.1.0")),
    "lora of adapter-transformers": ("lora", of_version("3.2.1")),
    "lora without a version": ("lora", of_version(None)),
    "ia3 before its scale": ("ia3", of_version("adapters.1.0.1")),
    "ia3 with its scale": ("ia3", of_version("adapters.1.2.0")),
    "gelu of adapter-transformers 2": ("bottleneck", of_version("2.3.0")),
    "gelu of the first": ("bottleneck", of_version(None)),
    "gelu_orig of the first": ("bottleneck", of_version(None, non_linearity="gelu_orig")),
    "houlsby of the first": ("houlsby", first),
    "pfeiffer of the first": ("bottleneck", first),
    "pfeiffer of the first, with glow": ("bottleneck", first_with_glow),
    "language of the first": ("invertible", first_of_a_language),
    "task of the first with an inverse": ("invertible", first),
    "prefix of today": ("prefix", of_version("adapters.1.3.0")),
    "prefix without a version": ("prefix", of_version(None)),
    "flat prefix without a version": ("flat", of_version(None)),
    "compacter without a version": ("compacter", of_version(None)),
}


@needs_adapters
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_version_computes_what_the_library_makes_of_it(
    form: str, base: Path, handle: ModelHandle, made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    kind, change = FORMS[form]
    shutil.copytree(made(kind, "tagging"), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, change)
    if change in (first, first_of_a_language, first_with_glow):
        rename(tmp_path)
    raw, logits = ours(tmp_path, handle)
    torch.testing.assert_close(logits, theirs(tmp_path, base))
    assert raw.config["version"] == VERSION
    assert not raw.notes
    if kind in ("bottleneck", "houlsby"):
        assert not raw.config["config"]["inv_adapter"]


@needs_adapters
@pytest.mark.parametrize("model_class", ["BertModelWithHeads", "BertAdapterModel"])
def test_a_head_of_the_first_versions(
    model_class: str, base: Path, handle: ModelHandle, made: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Its settings name no activation and no pooler, and its file has no version."""
    shutil.copytree(made("bottleneck", "classification"), tmp_path, dirs_exist_ok=True)

    def change(config: dict[str, Any]) -> None:
        config["model_class"] = model_class
        del config["version"]
        for name in ("activation_function", "use_pooler", "bias", "dropout_prob"):
            config["config"].pop(name, None)

    edit(tmp_path, change, "head_config.json")
    raw, logits = ours(tmp_path, handle)
    torch.testing.assert_close(logits, theirs(tmp_path, base))
    head = resolve(raw, handle.architecture, handle.base_tensors()).head
    assert head is not None
    assert (head.activation, head.reads) == ("tanh", "first.out")
    write_checkpoint(tmp_path, raw, written_names(handle, raw.task))
    written = [json.loads((tmp_path / f"{name}_config.json").read_text()) for name in ("adapter", "head")]
    assert [(config["version"], config["model_class"]) for config in written] == [(VERSION, "BertAdapterModel")] * 2
    torch.testing.assert_close(theirs(tmp_path, base), logits)


def test_the_scale_is_decided_by_the_version() -> None:
    settings = {"architecture": "lora", "r": 4, "alpha": 8}
    scales = {
        version: todays_settings(settings, {"version": version}, "here")["alpha"] / 4
        for version in ("adapters.0.1.0", "adapters.1.0.1", "adapters.1.1.0rc1", "adapters.1.1.0", "adapters", "3.2.1")
    }
    assert list(scales.values()) == [1, 1, 1, 2, 2, 2]
    with pytest.raises(CheckpointError, match=r"here: the version of the library .* found adapters\.new"):
        todays_settings(settings, {"version": "adapters.new"}, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MH_Adapter": True}, "lack mh_adapter, output_adapter, reduction_factor, non_linearity, which no version"),
        ({"invertible_adapter": {"block_type": "nice"}}, "the settings of the invertible part are not complete"),
    ],
)
def test_settings_of_no_version(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        todays_settings(settings, {}, "here")


def test_two_old_names_of_one_place() -> None:
    one = torch.ones(1)
    keys = [f"layer.0.output.layer_text_{kind}_adapters.x.adapter_up.bias" for kind in ("task", "lang")]
    with pytest.raises(CheckpointError, match=f"{keys[0]} and {keys[1]}"):
        todays_tensors(dict.fromkeys(keys, one), "here")


@needs_adapters
def test_an_invertible_part_in_settings_or_tensors_alone(made: Callable[[str, str], Path], tmp_path: Path) -> None:
    """What the library does not load, or would make up, is left out and said."""
    shutil.copytree(made("invertible", "tagging"), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, of_version(VERSION, inv_adapter=None))
    raw = read_checkpoint(tmp_path)
    assert raw.notes == ("the invertible part is left out: the settings name none, so its library loads none",)
    assert not any("invertible" in path for path in raw.parts)
    shutil.copy(made("bottleneck", "tagging") / "pytorch_adapter.bin", tmp_path)
    edit(tmp_path, of_version(VERSION, inv_adapter="nice"))
    raw = read_checkpoint(tmp_path)
    assert raw.notes == ("the settings name an invertible part, and the file holds none",)
    assert raw.config["config"]["inv_adapter"] is None


@needs_adapters
@pytest.mark.parametrize("name", ["pfeiffer", "seq_bn[reduction_factor=8]", None])
def test_settings_by_their_identifier(name: str | None, made: Callable[[str, str], Path], tmp_path: Path) -> None:
    shutil.copytree(made("houlsby", "tagging"), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, lambda config: config.update(config=name))
    assert read_checkpoint(tmp_path).config["config"]["original_ln_before"] is True
    for unknown in ("seq_bm", "seq_bn[reduction_factor=", "adapter_config.json"):
        edit(tmp_path, lambda config, unknown=unknown: config.update(config=unknown))
        with pytest.raises(CheckpointError, match="an identifier that the library adapters does not know"):
            read_checkpoint(tmp_path)
