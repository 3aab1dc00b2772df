"""A kind of module and a format from outside the package: the code of docs/extending.md, as it stands there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tiny
from peft_graft.alignment.maps import Selection
from peft_graft.alignment.methods import METHODS
from peft_graft.checkpoints.formats.base import FORMATS, format_of, register_format
from peft_graft.checkpoints.formats.peft import codec
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve, to_raw
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import METHOD_SUMMARIES, Library
from peft_graft.errors import CheckpointError
from peft_graft.models.loading import blank_handle, describe_config
from peft_graft.models.spaces import Site
from peft_graft.models.tasks import Task
from peft_graft.modules.average import average
from peft_graft.modules.base import MODULES
from peft_graft.projection import project

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
PATHS = [f"encoder.layer.{layer}.attention.self.query" for layer in range(2)]


def code_of(heading: str) -> list[str]:
    """The code blocks of a section of the page."""
    section = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None, heading
    return re.findall(r"^```python\n(.*?)^```$", section[0], re.M | re.S)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's two files, imported, and forgotten afterwards."""
    before = [(known, dict(known)) for known in (MODULES, FORMATS, codec.CODECS)]
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "code").mkdir()
    for heading in ("Add a kind of module", "Add a format"):
        code = code_of(heading)[0]
        name = re.match(r'"""(\w+\.py):', code)
        assert name is not None, heading
        (tmp_path / "code" / name[1]).write_text(code)
    yield importlib.import_module("offsets_format")
    for name in ("offsets", "offsets_format"):
        sys.modules.pop(name, None)
    for known, entries in before:
        known.clear()
        known.update(entries)


@pytest.fixture
def nearest() -> Iterator[None]:
    """The page's method, registered, and forgotten afterwards."""
    before = [(known, dict(known)) for known in (METHODS, METHOD_SUMMARIES)]
    exec(compile(code_of("Add a method")[0], "nearest.py", "exec"), {})
    yield
    for known, entries in before:
        known.clear()
        known.update(entries)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.base_model(tmp_path / "base", layers=2)


@pytest.fixture
def module(tmp_path: Path, base: Path) -> Path:
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "offsets.json").write_text(json.dumps({"base_model": str(base)}))
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"{path}.offset": torch.randn(32, generator=generator) for path in PATHS}, folder / "offsets.safetensors"
    )
    return folder


def test_the_kind_has_sixty_lines_at_most() -> None:
    assert len(code_of("Add a kind of module in 60 lines")[0].splitlines()) <= 60


def test_the_method_aligns_and_moves(nearest, world: Path) -> None:
    options = {"text": world / "text.txt", "method": "nearest", "polish": 0}
    graft = tiny.transfer(world / "lora", world / "narrow", **options)
    assert graft.report.method == "nearest"
    assert "nearest, as moved" in graft.report.tried
    alignment = tiny.align(world / "teacher", world / "narrow", text=world / "text.txt", method="nearest")
    found = alignment.map(next(iter(alignment.maps)))
    assert isinstance(found, Selection)
    assert len(set(found.indices.tolist())) < len(found.indices), "units may share one of the teacher's"


def test_from_files_to_sites_and_back(outside, module: Path, base: Path) -> None:
    raw = read_checkpoint(module)
    assert (raw.library, raw.kind, list(raw.parts)) == ("offsets", "offsets", PATHS)
    assert raw.is_active
    assert raw.num_parameters == 64
    architecture = describe_config(transformers.AutoConfig.from_pretrained(base))
    checkpoint = resolve(raw, architecture)
    assert list(checkpoint.modules) == [Site(0, "attn.query"), Site(1, "attn.query")]
    assert to_raw(checkpoint, architecture).parts == raw.parts


def test_it_is_projected_averaged_and_switched_off(outside, module: Path, base: Path) -> None:
    raw = read_checkpoint(module)
    checkpoint = resolve(raw, describe_config(transformers.AutoConfig.from_pretrained(base)))
    first, second = checkpoint.modules.values()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    moved = project(first, lambda axis: Selection(order, 32))
    assert torch.equal(moved.tensors["offset"].values, raw.parts[PATHS[0]].offset[order])
    mean = average([first, second])
    expected = (raw.parts[PATHS[0]].offset.double() + raw.parts[PATHS[1]].offset.double()) / 2
    torch.testing.assert_close(mean.tensors["offset"].values, expected.float())
    assert first.is_active
    assert not first.neutral().is_active


def test_the_verbs_take_it(outside, module: Path, base: Path, tmp_path: Path) -> None:
    found = tiny.inspect(module, student=base)
    assert (found.module_library, found.kind) == ("offsets", "offsets")
    assert found.student is not None
    assert found.student.problem is None
    graft = tiny.transfer(module, student=base, method="copy", out=tmp_path / "graft")
    assert any("not verified" in note for note in graft.report.notes)
    assert read_checkpoint(tmp_path / "graft").parts == read_checkpoint(module).parts


def test_a_codec_puts_the_kind_into_files_of_peft(outside, base: Path) -> None:
    part = sys.modules["offsets"].OffsetPart

    @codec.register_codec
    class OffsetCodec(codec.Codec):
        kind, peft_types = "offsets", ("OFFSETS",)

        def place(self, path):
            owner, _, name = path.rpartition(".")
            return (owner, name) if name == "offset" else None

        def parts(self, found, config, where):
            return {path: part(values["offset"]) for path, values in found.items()}

        def tensors(self, parts):
            return {f"{self.prefix}{path}.offset": each.offset for path, each in parts.items()}

    config = transformers.AutoConfig.from_pretrained(base)
    names = written_names(blank_handle(config, str(base)), Task.BASE)
    tensors = {f"base_model.model.{path}.offset": torch.ones(32) for path in PATHS}
    raw = format_of(Library.PEFT).parse({"peft_type": "OFFSETS", "task_type": None}, tensors)
    assert (raw.kind, list(raw.parts)) == ("offsets", PATHS)
    written, again = format_of(Library.PEFT).build(raw, names)
    assert written["target_modules"] == ["query"]
    assert again.keys() == tensors.keys()


def test_a_part_that_belongs_to_no_kind_is_named(outside, module: Path, base: Path) -> None:
    raw = read_checkpoint(module)
    MODULES.pop(type(raw.parts[PATHS[0]]))
    with pytest.raises(CheckpointError, match="no kind of module is registered for OffsetPart"):
        resolve(raw, describe_config(transformers.AutoConfig.from_pretrained(base)))


def test_a_format_that_is_not_registered_is_named(outside, module: Path, base: Path) -> None:
    raw = read_checkpoint(module)
    FORMATS.pop("offsets")
    with pytest.raises(CheckpointError, match="the folder holds no module checkpoint"):
        read_checkpoint(module)
    with pytest.raises(CheckpointError, match="no format is registered for this library"):
        resolve(raw, describe_config(transformers.AutoConfig.from_pretrained(base)))
    register_format(outside.OffsetsFormat)
    assert read_checkpoint(module).parts == raw.parts
