"""One field for every choice of a user: checked, recorded, and an option of the command line."""

from __future__ import annotations

import pytest
import typer
from transformers import QuantoConfig
from typer.testing import CliRunner

import peft_graft
from peft_graft import AlignConfig, EvaluateConfig, ExportConfig, GraftConfig, GraftError
from peft_graft.cli.late import with_options
from peft_graft.cli.main import app
from peft_graft.cli.options import options_from
from peft_graft.config import StudyConfig, option_name, option_of

COMMANDS = {
    "inspect": GraftConfig,
    "transfer": GraftConfig,
    "align": AlignConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "study": StudyConfig,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_an_option_and_is_explained(command: str) -> None:
    config = COMMANDS[command]
    assert command in typer.main.get_command(app).commands
    known = with_options(command).params
    options = {name for parameter in known for name in parameter.opts}
    for name, field in config.model_fields.items():
        assert option_name(name) in options
        assert field.description
        assert option_of(config, name).panel


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--layers", "avg", "--polish", "30", "--head", "fit", "--seed", "3"],
        ["--sites", "attn.query,ffn.*", "--columns", "premise, hypothesis", "--library", "adapters", "--cache"],
        ["--quantization-config", '{"load_in_8bit": true}', "--device-map", "auto", "--no-cache"],
        ["--device-map", '{"": "cpu"}', "--dtype", "bfloat16", "--token", "hf_x", "--trust-remote-code"],
        ["--labels", "O, B-PER"],
        ["--labels", "use"],
        ["--for", "vllm"],
    ],
)
def test_a_command_line_makes_the_config_that_python_would(arguments: list[str]) -> None:
    made = []
    small = typer.Typer()

    @small.command()
    @options_from
    def keep(config: GraftConfig) -> None:
        made.append(config)

    done = CliRunner().invoke(small, arguments)
    assert done.exit_code == 0, done.output
    expected = {
        (): {},
        "avg": {"layers": "avg", "polish": 30, "head": "fit", "seed": 3},
        "attn.query,ffn.*": {"sites": ("attn.query", "ffn.*"), "columns": ("premise", "hypothesis"),
                             "library": "adapters", "cache": True},
        '{"load_in_8bit": true}': {"quantization_config": {"load_in_8bit": True}, "device_map": "auto", "cache": False},
        '{"": "cpu"}': {"device_map": {"": "cpu"}, "dtype": "bfloat16", "token": "hf_x", "trust_remote_code": True},
        "O, B-PER": {"labels": ("O", "B-PER")},
        "use": {"labels": "use"},
        "vllm": {"for_": "vllm"},
    }[arguments[1] if arguments else ()]  # fmt: skip
    assert made == [GraftConfig(**expected)]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("polish", -1, "--polish"),
        ("polish", "many", "--polish"),
        ("head", "keep", "auto, carry, fit, drop"),
        ("method", "svd", "prune-align"),
        ("max_tokens", 0, "must be positive"),
        ("for_", "onnx", "--for: unknown choice; expected gguf, vllm"),
        ("dtype", "float8", "float32, float16, bfloat16"),
        ("step", 1, "there is no such option"),
    ],
)
def test_a_wrong_value_names_its_option_and_what_there_is(field: str, value: object, said: str) -> None:
    with pytest.raises(GraftError) as caught:
        GraftConfig(**{field: value})
    assert said in str(caught.value)
    assert str(value) in str(caught.value) or field == "step"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("polish", True, "--polish: is of another type; expected a number or auto, found True (bool)"),
        ("seed", False, "--seed: is of another type; expected a number, found False (bool)"),
        ("polish", None, "--polish: is of another type; expected a whole number, found None (NoneType)"),
        ("layers", [0, 2], '--layers: is of another type; expected text, found [0, 2] (list). Fix: write "0,2"'),
        ("sites", ["attn.*", 3], '--sites entry 2: is of another type; expected text, found 3 (int). Fix: write "3"'),
        ("columns", 3, "--columns: is of another type; expected names in a list"),
        ("labels", {1: "O"}, "--labels: this holds no labels in order; expected names"),
        ("labels", {"O", "B-PER"}, "--labels: this holds no labels in order; expected names"),
        ("labels", [None, "O"], "--labels: a label has no name"),
    ],
)
def test_a_value_of_another_type_names_what_to_write(field: str, value: object, said: str) -> None:
    with pytest.raises(GraftError) as caught:
        GraftConfig(**{field: value})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("config", [GraftConfig, EvaluateConfig])
@pytest.mark.parametrize("labels", [{0: "O", 1: "B-PER"}, {"0": "O", "1": "B-PER"}, {"B-PER": 1, "O": 0}])
def test_labels_as_a_configuration_has_them(config: type[GraftConfig], labels: dict[object, object]) -> None:
    assert config(labels=labels).labels == ("O", "B-PER")


def test_a_record_holds_what_decides_the_result_and_no_token() -> None:
    record = GraftConfig(token="hf_secret", force=True, cache=True, sites=("attn.query",)).record()
    assert record["sites"] == ["attn.query"]
    assert not {"token", "force", "cache"} & record.keys()
    assert "hf_secret" not in repr(GraftConfig(token="hf_secret"))


def test_no_file_holds_the_token(world, tmp_path) -> None:
    aligned = peft_graft.align(
        world / "teacher", world / "narrow", text=world / "text.txt", out=tmp_path / "alignment",
        config=AlignConfig(token="hf_secret", max_tokens=1000),
    )  # fmt: skip
    graft = peft_graft.transfer(
        world / "lora", world / "narrow", alignment=aligned, out=tmp_path / "graft",
        config=GraftConfig(token="hf_secret"),
    )  # fmt: skip
    assert graft.report.settings.token == "hf_secret"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_objects_of_transformers_are_taken() -> None:
    config = GraftConfig(quantization_config=QuantoConfig(weights="int8"))
    assert config.quantization_config["weights"] == "int8"
    assert GraftConfig(quantization_config=config.record()["quantization_config"]) == config


def test_one_name_needs_no_list() -> None:
    assert GraftConfig(columns="text", sites="attn.query, attn.value").columns == ("text",)
    assert GraftConfig(columns="text", sites="attn.query, attn.value").sites == ("attn.query", "attn.value")
    assert AlignConfig(sites="adapter").sites == ("adapter",)
    assert EvaluateConfig(columns="question,answer").columns == ("question", "answer")
