"""What a graft's own card says: its code runs from another folder, it names no path, and no string breaks it."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import peft_graft
import tiny
from conftest import needs_adapters
from peft_graft import Graft, GraftConfig
from peft_graft.card import write_model_card
from peft_graft.checkpoints.student_names import written_names
from peft_graft.distill.agreement import GenerationAgreement, Verdict
from peft_graft.distill.completions import PromptRecord
from peft_graft.errors import HeadError, plain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SHAPE = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 16}
IDS = torch.tensor([[2, 9, 20, 33, 3]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in ``models/`` and modules in ``modules/`` whose bases are named by relative paths, as they were typed."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        base = Path("models/bert")
        tiny.base_model(base, **SHAPE)
        tiny.peft_lora(Path("modules/tags"), base)
        tiny.peft_lora(Path("modules/sentiment"), base, task="sequence-classification", labels=("neg", "pos"))
        tiny.peft_lora(Path("modules/bare"), base, task="base", labels=())
        config = transformers.LlamaConfig(
            vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        tiny.saved(Path("models/llama"), config, transformers.AutoModelForCausalLM)
        tokenizer = transformers.AutoTokenizer.from_pretrained("models/llama")
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
        )
        tokenizer.save_pretrained("models/llama")
        speaker = transformers.AutoModelForCausalLM.from_pretrained("models/llama")
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        peft.get_peft_model(speaker, lora).save_pretrained("modules/speech")
        loha = peft.LoHaConfig(task_type="TOKEN_CLS", r=2, target_modules=["query"], init_weights=False)
        peft.get_peft_model(tiny.task_model(base), loha).save_pretrained("modules/converted")
        asker = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
        lora = peft.LoraConfig(task_type="QUESTION_ANS", r=2, target_modules=["query"], init_lora_weights=False)
        peft.get_peft_model(asker, lora).save_pretrained("modules/questions")
        if tiny.HAS_ADAPTERS:
            tiny.adapterhub_module(Path("modules/tagger"), base, head="tagging")
            tiny.adapterhub_module(Path("modules/sorter"), base, head="classification", use_safetensors=True)
            tiny.adapterhub_module(Path("modules/headless"), base, head=None)
            static_head(Path("modules/static"), base)
    return root


def static_head(folder: Path, base: Path) -> None:
    """A module of the library adapters in a task model of transformers, with that model's own head."""
    import adapters

    model = tiny.task_model(base)
    adapters.init(model)
    model.add_adapter("skill", config="seq_bn", set_active=True)
    tiny.randomise(model, 1, ("adapters.skill", "classifier"))
    model.save_adapter(str(folder), "skill", with_head=True)


def grafted(made: Path, module: str, out: Path, patch: pytest.MonkeyPatch, **options: Any) -> Graft:
    """A graft from relative paths onto a model of a relative path."""
    student = "models/llama" if module == "speech" else "models/bert"
    with patch.context() as inside:
        inside.chdir(made)
        return peft_graft.transfer(f"modules/{module}", student, out=out, config=GraftConfig(method="copy", **options))


def codes_of(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)


def code_of(folder: Path) -> str:
    found = codes_of(folder)
    assert len(found) == 1 + ("\nIn one line:\n" in (folder / "README.md").read_text())
    return found[0]


def last(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=IDS)
    names = ("logits", "start_logits", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def drop(**options: Any) -> dict[str, Any]:
    return {"head": "drop", **options}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tags, named": ("tags", {"labels": tiny.LABELS}),
    "tags, unnamed": ("tags", {}),
    "tags, no head": ("tags", drop()),
    "sentences": ("sentiment", {"labels": "neg, pos"}),
    "a bare encoder": ("bare", {}),
    "questions": ("questions", drop()),
    "a language model": ("speech", {}),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a head of the library": ("tagger", {}),
    "a head in safetensors": ("sorter", {"labels": ("a", "b", "c")}),
    "no head": ("headless", {}),
    "a head of transformers": ("static", {"labels": ("a", "b", "c", "d", "e")}),
    "from peft, named": ("tags", {"library": "adapters", "labels": tiny.LABELS}),
    "from peft, no head": ("tags", drop(library="adapters")),
    "from peft, a bare encoder": ("bare", {"library": "adapters"}),
    "from peft, a language model": ("speech", {"library": "adapters"}),
}
ALL = [pytest.param(case, id=name) for name, case in CASES.items()] + [
    pytest.param(case, id=f"adapters: {name}", marks=needs_adapters) for name, case in ADAPTERS.items()
]


@pytest.mark.parametrize("case", ALL)
def test_the_code_of_the_card_loads_the_graft_from_another_folder(
    case: tuple[str, dict[str, Any]], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As it stands: model, labels and outputs are those of the graft, and its last line prints an answer."""
    module, options = case
    graft = grafted(made, module, tmp_path / "graft", monkeypatch, **options)
    assert str(made) not in (tmp_path / "graft" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    space: dict[str, Any] = {}
    transformers.set_seed(0)  # pipelines draw
    exec(compile(code_of(tmp_path / "graft"), "README.md", "exec"), space)
    answer = capsys.readouterr().out
    assert answer.strip()
    model = space["model"]
    assert torch.equal(last(model), last(graft.model.eval()))
    for line in codes_of(tmp_path / "graft")[1:]:
        transformers.set_seed(0)
        exec(compile(line, "README.md", "exec"), {})
        assert capsys.readouterr().out == answer
    if graft.labels:
        names = model.get_labels_dict() if hasattr(model, "get_labels_dict") else model.config.id2label
        assert tuple(names[index] for index in sorted(names)) == graft.labels
        assert json.loads((tmp_path / "graft" / "graft.json").read_text())["head"]["labels"] == list(graft.labels)


def test_what_is_written_loads_with_the_automatic_classes(made: Path, tmp_path: Path, monkeypatch) -> None:
    """Where peft and transformers can do it by themselves, from another folder than the one of the relative paths."""
    grafts = {name: grafted(made, name, tmp_path / name, monkeypatch) for name in ("speech", "sentiment", "bare")}
    monkeypatch.chdir(tmp_path)
    for name, auto in (
        ("speech", peft.AutoPeftModelForCausalLM),
        ("sentiment", peft.AutoPeftModelForSequenceClassification),
        ("bare", peft.AutoPeftModel),
    ):
        assert torch.equal(last(auto.from_pretrained(name)), last(grafts[name].model.eval()))
    grafted(made, "tags", tmp_path / "tags", monkeypatch, labels=tiny.LABELS)
    tagger = peft.AutoPeftModelForTokenClassification.from_pretrained("tags", num_labels=5)
    assert torch.equal(last(tagger), last(Graft.from_pretrained("tags").model.eval()))
    speak = transformers.pipeline("text-generation", model="speech")
    assert torch.equal(last(speak.model), last(grafts["speech"].model.eval()))
    assert speak("river", max_new_tokens=3)[0]["generated_text"]
    assert torch.equal(last(Graft.from_pretrained("sentiment").model.eval()), last(grafts["sentiment"].model.eval()))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"system": "Be brief.", "template_args": {"short": True}}, "system Be brief. user Maria moved"),
        ({"format": r"Say '{prompt}':\n"}, "Say 'Maria moved to Lisbon in winter.':\n"),
    ],
)
def test_a_language_model_is_asked_as_it_was_taught(
    settings: dict[str, Any], asked: str, made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """By its chat template with the same arguments, or in the format of the module."""
    graft = grafted(made, "speech", tmp_path / "graft", monkeypatch)
    report = graft.report.model_copy(
        update={"prompts": PromptRecord.model_construct(made=None), "settings": GraftConfig(**settings)}
    )
    names = written_names(graft.student, graft.raw.task)
    write_model_card(tmp_path / "graft", report, graft.raw, graft.student, (), names=names, graft="graft")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = code_of(tmp_path / "graft").replace("max_new_tokens=64", "max_new_tokens=3")
    exec(compile(code, "README.md", "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])[0]["generated_text"]
    assert said.startswith(asked)
    assert ("**{'short': True}" in code) == ("template_args" in settings)


def test_models_are_named_by_their_hub_ids_and_found_by_their_paths(made: Path, tmp_path: Path, monkeypatch) -> None:
    """A folder's own configuration may say what it is a copy of."""
    config = json.loads((made / "models" / "bert" / "config.json").read_text())
    student = tmp_path / "copy"
    transformers.AutoModel.from_pretrained(made / "models" / "bert").save_pretrained(student)
    (student / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/some-bert"}))
    monkeypatch.chdir(made)
    graft = peft_graft.transfer("modules/tags", student, out=tmp_path / "graft", config=GraftConfig(method="copy"))
    assert graft.report.student.name == str(student)
    assert graft.report.teacher.name == str(made / "models" / "bert")
    assert graft.report.module == str(made / "modules" / "tags")
    assert json.loads((tmp_path / "graft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        student
    )
    card = ModelCard.load(tmp_path / "graft" / "README.md")
    assert card.data.base_model == "org/some-bert"
    assert "moved to `org/some-bert`" in card.text
    assert "trained on `bert`" in card.text
    assert str(tmp_path) not in card.content


def test_a_teachers_folder_is_named_as_the_module_names_its_base(made: Path, tmp_path: Path) -> None:
    """What a model was made from, which its configuration may say, is not what a module of it was trained on."""
    teacher, module = tmp_path / "old", tmp_path / "module"
    shutil.copytree(made / "models" / "bert", teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/ancestor"}))
    shutil.copytree(made / "modules" / "tags", module)
    config = json.loads((module / "adapter_config.json").read_text())
    (module / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/old"}))
    named = GraftConfig(method="copy")
    graft = peft_graft.transfer(module, made / "models" / "bert", teacher=teacher, out=tmp_path / "graft", config=named)
    assert graft.report.teacher.hub_id == "org/old"
    assert "trained on `org/old`" in (tmp_path / "graft" / "README.md").read_text()


HOSTILE = [
    "---",
    "a\n---\nlicense: mit\n---\n",
    "```",
    "\n```\nimport os\n```\n",
    "| x | y |",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1)) ![image](http://x/y.png)",
    "'\"\"\"'''\\",
    "{{ report }} {% raw %}",
    "# heading",
    "\x1b[31mred\x1b[0m \u202egnp \ud800",
    "&lt;b&gt; *a* _b_ ~~c~~",
    "https://evil.example www.evil.example evil@example.org",
]


def test_no_string_breaks_the_card(made: Path, tmp_path: Path, monkeypatch) -> None:
    """Labels, names, notes: hostile ones leave the metadata, the table, the text and the code as they are."""
    graft = grafted(made, "tags", tmp_path / "graft", monkeypatch, labels=tiny.LABELS)
    tame = (tmp_path / "graft" / "README.md").read_text()
    report, labels = graft.report, tuple(f"{index}{text}" for index, text in enumerate(HOSTILE))
    everything = " ".join(HOSTILE)
    hostile = report.model_copy(
        update={
            "student": report.student.model_copy(update={"name": f"/{everything.replace('/', '')}"}),
            "teacher": report.teacher.model_copy(update={"name": everything}),
            "text": everything,
            "notes": [everything, *report.notes],
            "method_reason": everything,
            "module_kind": everything,
        }
    )
    names = written_names(graft.student, graft.raw.task)
    write_model_card(tmp_path, hostile, graft.raw, graft.student, labels, names=names, graft=everything)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {**ModelCard(tame).data.to_dict(), "tags": ["peft-graft", plain(everything)[:200]]}
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(ast.parse(code_of(tmp_path)))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(assigned["labels"]) == list(labels)
    assert ast.literal_eval(assigned["graft"]) == everything

    def outline(text: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
        inner = [child.type for token in tokens for child in token.children or () if child.type != "text"]
        return [token.type for token in tokens], inner.count("html_inline") + inner.count("link_open") + inner.count(
            "image"
        )

    added = tame.replace("\n## Load it", "\nNote: one more.\n\n## Load it")
    assert outline((tmp_path / "README.md").read_text()) == outline(added)


def test_what_the_hub_reads_comes_from_the_cards_of_what_went_in(made: Path, tmp_path: Path, monkeypatch) -> None:
    """Licences of both bases and of the module, the module's languages and data, and the figures of the verdict."""
    for name in ("models", "modules"):
        shutil.copytree(made / name, tmp_path / name)
    student, module = tmp_path / "models" / "llama", tmp_path / "modules" / "speech"
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/llama"}))
    (student / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    about = "---\nlicense: apache-2.0\nlanguage: [en, pt, '<b>']\ndatasets:\n- org/data\n- ../x\n- 5\n---\n"
    (module / "README.md").write_text(about)
    graft = grafted(tmp_path, "speech", tmp_path / "graft", monkeypatch)
    said, text = metadata(tmp_path / "graft")
    assert said["base_model"] == "org/llama"
    assert said["base_model_relation"] == "adapter"
    assert said["tags"] == ["peft-graft", "lora", "base_model:adapter:org/llama"]
    assert said["license"] == "apache-2.0"
    assert said["language"] == ["en", "pt"]
    assert said["datasets"] == ["org/data"]
    assert "model-index" not in said, "nothing was measured"
    assert "| licences | The new base: apache-2.0; the old base: apache-2.0; the module: apache-2.0 |" in text

    (module / "README.md").write_text("---\nlicense: gemma\n---\n")
    verdict = Verdict(
        level="strong",
        text="fine",
        generated=GenerationAgreement(
            agreement=0.91234, exact=0.5, token_f1=0.8, bare_exact=0, bare_token_f1=0.1, answers=9
        ),
    )
    result = EvalResult("text-generation", "org/data", "Data", "exact_match", 0.75, metric_name="Exact <b>match</b>")
    measured = replace(graft, report=graft.report.model_copy(update={"verdict": verdict}))
    measured.save_pretrained(tmp_path / "measured", results=[result])
    said, text = metadata(tmp_path / "measured")
    assert said["license"] == "other"
    assert "They differ, and what is made from all of them has to keep to each (the new base: apache-2.0;" in text
    assert "The licences of what it was made from differ" in text
    assert "| Exact \\<b\\>match\\</b\\>, Data | 0.75 |" in text
    index = ModelCard.load(tmp_path / "measured" / "README.md").data.eval_results
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in index] == [
        ("held-out", "agreement", 0.9123),
        ("held-out", "exact_match", 0.5),
        ("held-out", "f1", 0.8),
        ("org/data", "exact_match", 0.75),
    ]

    (student / "README.md").write_text("---\nlicense: [1, {a: b}]\n---\n")
    (module / "README.md").unlink()
    graft.save_pretrained(tmp_path / "unknown")
    said, text = metadata(tmp_path / "unknown")
    assert not {"license", "language", "datasets"} & said.keys()
    assert (
        "| licences | The card of the new base and of the old base and of the module names none that could be read |"
    ) in text


def metadata(folder: Path) -> tuple[dict[str, Any], str]:
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_a_card_has_its_lineage_and_no_link(made: Path, tmp_path: Path, monkeypatch) -> None:
    graft = grafted(made, "tags", tmp_path / "graft", monkeypatch)
    text = metadata(tmp_path / "graft")[1]
    for name, digest in graft.report.module_files.items():
        assert f"{name} {digest}".replace("_", "\\_") in text
    assert graft.report.student.fingerprint in text
    assert "## Limits" in text
    assert "://" not in text


def told(graft: Graft, folder: Path, said: list[str]) -> ModelCard:
    """The card of a graft whose names, files and remarks say this."""
    report = graft.report
    changed = report.model_copy(
        update={
            "student": report.student.model_copy(update={"name": f"/x/{said[0]}"}),
            "teacher": report.teacher.model_copy(update={"name": f"/x/{said[1]}", "fingerprint": "0"}),
            "text": f"/x/{said[2]}",
            "notes": [f"a note {said[3]}"],
            "method_reason": f"since {said[4]}",
            "module_kind": f"kind {said[5]}",
            "module_files": {f"file {said[6]}": f"hash {said[7]}"},
        }
    )
    labels = tuple(f"{index}{text}" for index, text in enumerate(said))
    result = EvalResult("a", "b", f"on {said[0]}", f"metric {said[1]}", 1)
    names = written_names(graft.student, graft.raw.task)
    write_model_card(folder, changed, graft.raw, graft.student, labels, names=names, graft=said[1], results=[result])
    return ModelCard.load(folder / "README.md")


def outline(card: ModelCard) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    assert not {child.type for token in tokens for child in token.children or ()} & {
        "html_inline",
        "link_open",
        "image",
    }
    return [token.type for token in tokens]


@pytest.fixture(scope="module")
def once(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Graft, Counter[str]]]:
    """A graft, and the outline of its card where nothing is hostile."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        graft = grafted(made, "tags", folder / "graft", patch, labels=tiny.LABELS)
    tame = outline(told(graft, folder, ["tame"] * 8))
    return lambda: (graft, tame)  # which hypothesis need not print


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.one_of(st.text(max_size=60), st.sampled_from(HOSTILE)), min_size=8, max_size=8))
def test_no_text_at_all_breaks_the_card(
    said: list[str], once: Callable[[], tuple[Graft, Counter[str]]], tmp_path: Path
) -> None:
    """Whatever files, names and cards hold: the metadata reads back as it is, the text keeps its outline."""
    graft, tame = once()
    found = told(graft, tmp_path, said)
    assert found.data.tags == ["peft-graft", plain(f"kind {said[5]}")[:200]]
    assert found.data.model_name == (plain(said[1])[:200] or "graft")
    assert found.data.eval_results[-1].dataset_name == plain(f"on {said[0]}")[:200]
    assert outline(found) == tame
    prose = re.sub(r"^```python\n.*?^```$", "", found.text, flags=re.M | re.S)
    assert not re.search(r"(?<!\\)://|www\.", prose), "addresses of which the hub would make links"
    ast.parse(code_of(tmp_path))


@pytest.mark.parametrize("library", ["peft", pytest.param("adapters", marks=needs_adapters)])
def test_half_a_pair_of_surrogates_is_written_as_json_has_it(
    library: str, made: Path, tmp_path: Path, monkeypatch
) -> None:
    labels = ("\ud800", *"abcd")
    graft = grafted(made, "tags", tmp_path / "graft", monkeypatch, labels=labels, library=library)
    assert graft.labels == labels
    assert Graft.from_pretrained(tmp_path / "graft").labels == labels


def test_label_names_come_from_wherever_they_are(made: Path, tmp_path: Path) -> None:
    """From the option before the files; from the teacher where it has real ones; placeholders are none."""
    base, module = made / "models" / "bert", made / "modules" / "tags"

    def labels(**options: Any) -> tuple[str, ...]:
        return tiny.transfer(module, base, method="copy", **{"teacher": base, **options}).labels

    transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5).save_pretrained(
        tmp_path / "placeholders"
    )
    tiny.task_model(base).save_pretrained(tmp_path / "named")
    assert labels(teacher=tmp_path / "placeholders") == ()
    assert labels(teacher=tmp_path / "named") == tiny.LABELS
    assert labels(teacher=tmp_path / "named", labels="a,b,c,d,e") == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "O\nB-PER\n\nI-PER\nB-LOC\nI-LOC\n"),
        ("labels.json", json.dumps(tiny.LABELS)),
        ("labels.json", json.dumps(dict(enumerate(tiny.LABELS)))),
        ("labels.json", json.dumps({label: index for index, label in enumerate(tiny.LABELS)})),
        ("config.json", json.dumps({"id2label": dict(enumerate(tiny.LABELS)), "model_type": "bert"})),
    ],
)
def test_label_names_from_a_file(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    config = GraftConfig(labels=str(tmp_path / name))
    assert config.labels == tiny.LABELS
    assert config.record()["labels"] == list(tiny.LABELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a,,b", "--labels: a label has no name; expected names with commas between them, or a file: a JSON list or "
         "id2label, or one name in each line, found a, , b"),
        ("a,b,a", "--labels: two labels have the same name; found a"),
        ("none.txt", "--labels: the labels in none.txt cannot be read (No such file or directory). Fix: give names "
         "with commas between them, or a file: a JSON list or id2label, or one name in each line"),
    ],
)  # fmt: skip
def test_label_names_that_are_none(given: str, message: str) -> None:
    with pytest.raises(peft_graft.GraftError) as caught:
        GraftConfig(labels=given)
    assert str(caught.value) == message


def test_label_names_that_do_not_fit_are_refused_by_the_plan(made: Path, monkeypatch) -> None:
    monkeypatch.chdir(made)
    for module, options, message in (
        ("tags", {"labels": "a,b"},
         "--labels: the head has another number of classes; expected 5 names, found 2 (a, b)"),
        ("tags", {"labels": "a,b", "head": "drop"},
         "--labels: no head moves whose classes they could name; found 2 (a, b). Fix: leave --labels out"),
        ("converted", {"labels": "a,b"},
         "--labels: the head has another number of classes; expected 5 names, found 2 (a, b)"),
        ("speech", {"labels": "a,b"},
         "--labels: no head moves whose classes they could name; expected ignore or use, of a language model, "
         "found 2 (a, b). Fix: leave --labels out"),
    ):  # fmt: skip
        student = "models/llama" if module == "speech" else "models/bert"
        found = tiny.inspect(f"modules/{module}", student, method="copy", **options)
        assert found.student.problem == message
        with pytest.raises(HeadError) as caught:
            tiny.transfer(f"modules/{module}", student, method="copy", **options)
        assert str(caught.value) == message
    assert tiny.inspect("modules/converted", "models/bert", method="copy", labels="a,b,c,d,e").student.problem is None


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_card_of_a_question_answerer_prints_an_answer(
    seed: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Whichever way its head falls: where the best end lies before the best start, too."""
    grafted(made, "questions", tmp_path / "graft", monkeypatch, head="drop")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    transformers.set_seed(seed)
    exec(compile(code_of(tmp_path / "graft"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
