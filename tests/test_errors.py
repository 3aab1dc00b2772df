"""Everything that can go wrong for a user: one clear error that names the place and the fix, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import families
import tiny
from conftest import needs_adapters
from peft_graft import Callback, errors
from peft_graft.alignment.aligner import no_text
from peft_graft.alignment.text import read_text
from peft_graft.errors import (
    AlignmentError,
    ArchitectureError,
    CheckpointError,
    DeviceError,
    GraftError,
    HeadError,
    ModelError,
    OutputError,
    PairingError,
    PlanError,
    TextError,
    VerificationError,
)
from peft_graft.outputs import written_aside


class Stages(Callback):
    """The stages that a run has come to; the first one loads weights."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def on_stage_begin(self, stage: str) -> None:
        self.begun.append(stage)


@pytest.fixture
def module(world, tmp_path) -> Path:
    return Path(shutil.copytree(world / "lora", tmp_path / "module"))


@pytest.fixture
def move(world, tmp_path):
    """A transfer that would work, changed by the options given; afterwards nothing may lie in its output folder.

    What it refuses before it loads weights, ``inspect`` refuses in the same words.
    """

    def run(module: object = world / "lora", **options):
        settings = {"student": world / "narrow", "text": world / "text.txt", "out": tmp_path / "graft", **options}
        stages = Stages()
        try:
            return tiny.transfer(module, **settings, callbacks=[stages])
        except GraftError as error:
            refusal = error
        if not stages.begun and not isinstance(refusal, OutputError):
            assert refused_by_inspect(module, settings) == str(refusal)
        raise refusal

    yield run
    assert not list(tmp_path.glob(".*partial"))


def refused_by_inspect(module: object, settings: dict) -> str | None:
    """Why ``inspect`` says no; without text it says that text is needed, which is no refusal."""
    asked = {name: value for name, value in settings.items() if name not in ("out", "force")}
    try:
        found = tiny.inspect(module, **asked)
    except GraftError as error:
        return str(error)
    if asked["text"] is None and found.student.needs_text:
        return str(no_text("prune-align"))
    return found.student.problem


def weights(module: Path) -> dict[str, torch.Tensor]:
    return load_file(module / "adapter_model.safetensors")


def set_config(module: Path, **changes: object) -> None:
    path = module / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_errors_have_one_root_and_say_where_what_and_how() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, GraftError) for kind in kinds)
    assert str(PlanError("odd", where="layer 1", expected=2, found=3, fix="do this")) == (
        "layer 1: odd; expected 2, found 3. Fix: do this"
    )


# ---- the module ------------------------------------------------------------------------------------------------------


def test_no_such_module(move) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        move("./nowhere")


def test_a_hub_module_that_cannot_be_reached(move) -> None:
    with pytest.raises(CheckpointError, match=r"somebody/lora: no such folder, and the hub"):
        move("somebody/lora")


def test_a_folder_that_is_no_checkpoint(move, world) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no module checkpoint: this is a whole model, with no module in it or one that was merged into it; "
        r"expected adapter_config\.json of peft or adapters, found config\.json.*Fix: give the folder that save_",
    ):
        move(world / "teacher")


def test_a_folder_of_several_modules_names_them(move, tmp_path, world) -> None:
    shutil.copytree(world / "lora", tmp_path / "many" / "ner")
    with pytest.raises(CheckpointError, match="one of its sub-folders: ner"):
        move(tmp_path / "many")


@pytest.mark.parametrize("keep", [0, 40, 3000])
def test_truncated_safetensors(move, module, keep: int) -> None:
    path = module / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: the weights cannot be read.*truncated"):
        move(module)


def test_corrupt_json(move, module) -> None:
    (module / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: the file is not readable JSON"):
        move(module)


def test_missing_weights(move, module) -> None:
    (module / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights file is missing; expected adapter_model\.safetensors or"):
        move(module)


def test_a_pickle_with_code_in_it_is_not_run(move, module, tmp_path) -> None:
    (module / "adapter_model.safetensors").unlink()
    torch.save({"x": _Bomb(tmp_path / "ran")}, module / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickles with code in them are not loaded"):
        move(module)
    assert not (tmp_path / "ran").exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(move, module, value: float) -> None:
    tensors = weights(module)
    name = next(key for key in tensors if "layer.2.attention.self.value.lora_B" in key)
    tensors[name][0, 0] = value
    save_file(tensors, module / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.2\.attention\.self\.value\.lora_B\.weight holds NaN or inf"):
        move(module)


def test_two_adapters_in_one_file(move, module) -> None:
    tensors = weights(module)
    named = {key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items() for name in ("a", "b")}
    save_file({key: value.clone() for key, value in named.items()}, module / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"two adapters.*lora_A\.a\.weight and .*lora_A\.b\.weight\. Fix: keep"):
        move(module)


def test_two_towers_at_one_place_of_the_model(move, module) -> None:
    tensors = weights(module)
    towers = {
        key.replace("base_model.model.", f"base_model.model.{tower}."): value.clone()
        for key, value in tensors.items()
        for tower in ("query_encoder", "passage_encoder")
        if ".layer." in key
    }
    save_file(towers, module / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"two parts .* one place.* found passage_encoder.* and query_encoder"):
        move(module)


def test_a_tensor_of_nothing_that_is_known(move, module) -> None:
    tensors = {
        **weights(module),
        "base_model.model.bert.encoder.layer.0.attention.self.query.hada_w1_a": torch.ones(2, 2),
    }
    save_file(tensors, module / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="hada_w1_a is neither a part of a LORA module nor"):
        move(module)


def test_a_factor_without_its_twin(move, module) -> None:
    tensors = weights(module)
    del tensors[next(key for key in tensors if key.endswith("lora_B.weight"))]
    save_file(tensors, module / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lora_A of .* lacks its twin"):
        move(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADAPTION_PROMPT"}, "type ADAPTION_PROMPT cannot be moved"),
        ({"peft_type": "IA3"}, "the option bias='none' is not known"),
        ({"use_dora": True}, "lacks its magnitudes"),
        ({"bias": "all"}, "bias='all' is not supported yet; expected none, lora_only"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialisation changed"),
        ({"init_lora_weights": "lora_ga"}, "initialisation changed"),
        ({"init_lora_weights": "lora_ga_of_a_later_peft"}, "initialisation changed"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not supported yet"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config=.* is not supported yet; expected not set"),
        ({"option_of_a_later_peft": {"x": 1}}, "the option option_of_a_later_peft=.* is not known, and may change"),
        ({"enable_lora": [True, False, True]}, "enable_lora=.* is not supported yet"),
        ({"rank_pattern": {"query": 4}, "r": 16}, "another rank than the configuration says; expected 16, found 4"),
    ],
)
def test_kinds_that_are_not_supported_are_refused_by_name(move, module, changes, message: str) -> None:
    set_config(module, **changes)
    with pytest.raises(CheckpointError, match=message):
        move(module)


@needs_adapters
@pytest.mark.parametrize("rank", [2, 16])
def test_an_adapterhub_rank_that_its_library_would_not_load(move, world, tmp_path, rank: int) -> None:
    """The scale is alpha / r."""
    tiny.adapterhub_module(tmp_path / "m", world / "teacher", "lora[r=4,alpha=8]", head=None)
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    config["config"]["r"] = rank
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=rf"query have another rank than the settings say; expected {rank}, found 4\. Fix: correct r and alpha",
    ):
        move(tmp_path / "m")


@needs_adapters
def test_an_adapterhub_setting_that_is_not_supported(move, world, tmp_path) -> None:
    module = Path(shutil.copytree(world / "pfeiffer", tmp_path / "module"))
    config = json.loads((module / "adapter_config.json").read_text())
    config["config"]["stochastic_depth"] = 0.1
    (module / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stochastic_depth=0.1 are not supported yet"):
        move(module)


def test_trained_parts_of_the_base_are_not_left_behind_silently(move, world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", modules_to_save=["classifier", "token_type_embeddings"])
    for head in ("carry", "drop"):
        with pytest.raises(CheckpointError, match=r"trained part of its base model, bert\.embeddings\.token_type"):
            move(tmp_path / "m", head=head)


def test_a_module_that_does_nothing_is_not_written(move, module, tmp_path) -> None:
    tensors = weights(module)
    save_file(
        {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()},
        module / "adapter_model.safetensors",
    )
    with pytest.raises(VerificationError, match="loads but changes nothing"):
        move(module, method="prune-align", head="carry")
    assert not (tmp_path / "graft").exists()


# ---- the models ------------------------------------------------------------------------------------------------------


def test_no_teacher_named(move, module) -> None:
    set_config(module, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model.*--teacher"):
        move(module)


def test_the_teacher_cannot_be_reached(move, module) -> None:
    set_config(module, base_model_name_or_path="somebody/gone")
    with pytest.raises(ModelError, match="somebody/gone: the teacher cannot be loaded"):
        move(module)


def test_the_student_cannot_be_reached(move, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"the student cannot be loaded.*there is no folder"):
        move(student=tmp_path / "nothing")


def test_the_teacher_is_not_the_modules_base(move, world) -> None:
    with pytest.raises(ModelError, match=r"layer 0 attn\.query: the teacher is not the base.*expected 48.*found 32"):
        move(teacher=world / "wide")


def test_a_teacher_of_another_family_is_named_and_not_the_base_on_record(move, tmp_path) -> None:
    transformers.LlamaConfig(**families.COMMON, **families.FFN).save_pretrained(tmp_path / "other")
    with pytest.raises(GraftError, match=f"^{tmp_path / 'other'}: .* a llama model") as refused:
        move(teacher=tmp_path / "other")
    assert "--teacher" in str(refused.value)


def test_a_student_with_damaged_weights(move, world, tmp_path) -> None:
    student = Path(shutil.copytree(world / "narrow", tmp_path / "student"))
    (student / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="the student cannot be loaded"):
        move(student=student)


def test_an_unknown_architecture_is_refused_with_what_to_write(move, tmp_path) -> None:
    transformers.BlenderbotConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16,
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    with pytest.raises(
        ArchitectureError, match="blenderbot: .*cannot be inferred: found 2 stacks.*register_architecture"
    ):
        move(student=tmp_path / "other")


def test_a_slow_tokenizer(world) -> None:
    models = [transformers.AutoModel.from_pretrained(world / name) for name in ("teacher", "narrow")]
    (world / "vocab.txt").write_text("\n".join([*tiny.SPECIALS, *tiny.WORDS]))
    slow = transformers.BertTokenizer(str(world / "vocab.txt"))
    if slow.is_fast:
        pytest.skip("this version of transformers has no slow tokenizers")
    with pytest.raises(ModelError, match=r"slow tokenizer.*tokenizer\.json"):
        tiny.transfer_live(
            world / "lora",
            *models,
            teacher_tokenizer=slow,
            student_tokenizer=slow,
            text=tiny.sentences(),
        )


def test_a_token_that_the_model_has_no_embedding_of(move, world, tmp_path) -> None:
    """Of a tokenizer with more tokens than that, which do no harm where no text has them."""
    student = shutil.copytree(world / "narrow", tmp_path / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens([f"zz{number}" for number in range(300)])
    tokenizer.save_pretrained(student)
    assert tiny.inspect(world / "lora", student, text=world / "text.txt").student.problem is None
    text = tmp_path / "text.txt"
    text.write_text(f"{(world / 'text.txt').read_text()}\nriver zz299\n")
    highest = len(tokenizer) - 1
    with pytest.raises(
        ModelError,
        match="student: the tokenizer gives a token that the model has no embedding of, 'zz299'; expected ids "
        "below 200, the number of the model's embeddings, "
        rf"found id {highest} of the tokenizer's {highest + 1} tokens\. Fix: ",
    ):
        move(student=student, text=text)


def test_live_models_without_tokenizers(world) -> None:
    models = [transformers.AutoModel.from_pretrained(world / name) for name in ("teacher", "narrow")]
    for model in models:  # nothing says where their tokenizers are
        model.config._name_or_path = ""
    with pytest.raises(PairingError, match="without its tokenizer"):
        tiny.transfer_live(world / "lora", *models, text=tiny.sentences())


def test_a_live_model_with_a_module_inside(world) -> None:
    teacher = tiny.peft_lora(world / "again", world / "teacher").base_model.model
    student = transformers.AutoModel.from_pretrained(world / "shallow")
    with pytest.raises(ModelError, match="has a module inside"):
        tiny.transfer_live(world / "lora", teacher, student)


# ---- head ------------------------------------------------------------------------------------------------------------


def test_a_student_whose_own_head_has_other_labels(move, world, tmp_path) -> None:
    tiny.task_model(world / "narrow", labels=("no", "yes")).save_pretrained(tmp_path / "student")
    tiny.tokenizer(tmp_path / "student")
    with pytest.raises(HeadError, match="head with other labels; expected 5 labels, found no, yes.*--head drop"):
        move(student=tmp_path / "student")
    assert move(student=tmp_path / "student", head="drop", method="prune-align").report.head is None


def test_a_head_that_the_students_family_cannot_express(move, world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="sequence-classification")
    with pytest.raises(HeadError, match="expected inner layer: True, activation tanh, found .*relu.*--head drop"):
        move(tmp_path / "m")


def test_a_head_whose_pooler_was_never_saved(move, world, tmp_path) -> None:
    model = transformers.BertModel.from_pretrained(world / "teacher", add_pooling_layer=False)
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny.tokenizer(base)
    tiny.peft_lora(tmp_path / "m", base, task="sequence-classification")
    with pytest.raises(HeadError, match=r"pooler\.dense\.weight.*neither in the checkpoint.*--head drop"):
        move(tmp_path / "m", student=world / "wide")


# ---- options, text, tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "--method: unknown choice; expected auto, copy, prune-align, .*found magic"),
        ({"head": "keep"}, "--head: unknown choice; expected auto, carry, fit, drop"),
        ({"dtype": "int8"}, "--dtype: unknown choice"),
        ({"layers": "0,1,2"}, "--layers 0,1,2: the layer map has the wrong length"),
        ({"max_tokens": 0}, "--max-tokens: must be positive"),
    ],
)
def test_options_that_do_not_exist(move, options, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        move(**options)


@pytest.mark.parametrize("device", ["cuda:99", "warp"])
def test_no_such_device(move, device: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {device}: no such device; found available: cpu"):
        move(device=device)


def test_copy_between_sizes(move) -> None:
    with pytest.raises(AlignmentError, match="different size cannot be copied.*--method prune-align"):
        move(method="copy")


def test_no_text(move) -> None:
    with pytest.raises(TextError, match="--text: prune-align aligns the two models on text, and none was given"):
        move(text=None)


def test_missing_text(move, tmp_path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt: no such text file"):
        move(text=tmp_path / "nowhere.txt")
    with pytest.raises(TextError, match="no such data set, or the hub cannot be reached"):
        move(text="somebody/some-data")


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_empty_text(move, tmp_path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(TextError, match=r"empty\.txt: the text is empty"):
        move(text=tmp_path / "empty.txt")


def test_wrong_columns(move, tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text('{"a": "one two", "b": 1}\n')
    with pytest.raises(TextError, match="no column with a usual name; expected text or .*found a, b.*--columns"):
        move(text=tmp_path / "d.jsonl")
    with pytest.raises(TextError, match="no such columns; expected some of a, b, found c"):
        move(text=tmp_path / "d.jsonl", columns=["c"])
    with pytest.raises(TextError, match="column b: the column holds no text; expected strings.*found int"):
        move(text=tmp_path / "d.jsonl", columns=["b"])


def test_unknown_file_type_and_broken_file(tmp_path) -> None:
    (tmp_path / "d.docx").write_text("x")
    with pytest.raises(TextError, match=r"unknown type of text file; expected one of \.txt"):
        next(read_text(tmp_path / "d.docx"))
    (tmp_path / "d.parquet").write_text("x")
    with pytest.raises(TextError, match="the text cannot be read"):
        next(read_text(tmp_path / "d.parquet"))


def test_too_few_pairs_for_the_dimension(move, world, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("river mountain letter\n")
    with pytest.raises(
        TextError,
        match=r"short.txt: the text is too short to align the two models on; expected at least 32 tokens, some \d+ "
        r"lines like these, found \d tokens in 1 line. Fix: give more text, or a saved alignment",
    ):
        move(text=tmp_path / "short.txt", polish="auto")
    with pytest.raises(PairingError, match=r"too few paired tokens for the dimension; expected at least 32, found \d"):
        tiny.align(world / "teacher", world / "shallow", text=tmp_path / "short.txt")


def test_too_few_samples_for_a_sentence_head(move, world, tmp_path) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="sequence-classification")
    (tmp_path / "short.txt").write_text("\n".join(tiny.sentences(20)))
    with pytest.raises(PairingError, match=r"first\.out.*too few samples.*found 20.*--head drop"):
        move(tmp_path / "m", student=world / "wide", text=tmp_path / "short.txt", polish="auto")


def test_too_little_text_to_polish_on(move, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("\n".join(tiny.sentences(20)))
    with pytest.raises(TextError, match="too few samples to learn from.*expected at least 50, found 20"):
        move(text=tmp_path / "short.txt", polish=6)


def test_activations_that_are_not_finite(move, world, tmp_path) -> None:
    model = transformers.AutoModel.from_pretrained(world / "narrow")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "student")
    tiny.tokenizer(tmp_path / "student")
    with pytest.raises(PairingError, match="most activations are not finite"):
        move(student=tmp_path / "student")


# ---- alignments ------------------------------------------------------------------------------------------------------


def test_an_alignment_of_other_models(move, world, tmp_path) -> None:
    tiny.align(world / "teacher", world / "narrow", text=world / "text.txt", out=tmp_path / "a")
    with pytest.raises(AlignmentError, match="the alignment was made for another student"):
        move(student=world / "wide", alignment=tmp_path / "a")
    with pytest.raises(AlignmentError, match=r"lacks this pair of spaces"):
        move(layers="1,3", alignment=tmp_path / "a")
    with pytest.raises(AlignmentError, match="another method; expected prune-align, found copy"):
        tiny.transfer(world / "lora", student=world / "teacher", method="copy", alignment=tmp_path / "a")
    with pytest.raises(AlignmentError, match="holds no alignment"):
        move(alignment=world / "lora")


def test_aligning_with_copy_makes_no_sense(world) -> None:
    with pytest.raises(PlanError, match="copy needs no alignment"):
        tiny.align(world / "teacher", world / "narrow", text=world / "text.txt", method="copy")


# ---- output ----------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched_without_force(move, tmp_path) -> None:
    (tmp_path / "graft").mkdir()
    (tmp_path / "graft" / "mine").write_text("keep")
    with pytest.raises(OutputError, match="exists already.*--force"):
        move()
    with pytest.raises(OutputError, match="other things in it, which would be lost"):
        move(force=True)
    assert (tmp_path / "graft" / "mine").read_text() == "keep"
    (tmp_path / "graft" / "graft.json").write_text("{}")  # an earlier graft
    move(force=True, method="prune-align", head="carry")
    assert sorted(path.name for path in (tmp_path / "graft").iterdir())[:2] == ["README.md", "adapter_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft"]


def test_a_file_is_never_replaced(move, tmp_path) -> None:
    (tmp_path / "graft").write_text("keep")
    with pytest.raises(OutputError, match="is a file"):
        move(force=True)
    assert (tmp_path / "graft").read_text() == "keep"


def test_a_failure_with_force_leaves_the_old_folder(move, module, tmp_path) -> None:
    (tmp_path / "graft").mkdir()
    for name in ("mine", "graft.json"):
        (tmp_path / "graft" / name).write_text("keep")
    tensors = {key: value * 0 for key, value in weights(module).items()}
    save_file(tensors, module / "adapter_model.safetensors")
    with pytest.raises(VerificationError):
        move(module, force=True)
    assert (tmp_path / "graft" / "mine").read_text() == "keep"


def test_a_place_that_cannot_be_written(move, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written .*nothing was changed"):
        move(out=tmp_path / "file" / "graft")
    with pytest.raises(OutputError, match="cannot be written"):
        move(out=Path("/proc/graft"))


def test_a_full_disk(tmp_path, monkeypatch) -> None:
    """The operating system's error, and the shape in which safetensors and torch pass it on."""
    from safetensors import SafetensorError

    import peft_graft.files as weights_module

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights_module, "save_file", full)
    with (
        pytest.raises(OutputError, match=r"No space left on device.*nothing was changed"),
        written_aside(tmp_path / "out") as staging,
    ):
        weights_module.write_tensors(staging / "x.safetensors", {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(OutputError, match="No space left on device"),
        written_aside(tmp_path / "out") as staging,
    ):
        (staging / "part").write_text("half")
        raise OSError(28, "No space left on device", str(staging / "x"))
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "out") as staging:
        (staging / "part").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
