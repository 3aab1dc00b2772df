"""Every snippet of README and docs: Python and commands run as they stand, on tiny models that have the pages' names.

A block that cannot be run here says why in a comment before it, ``<!-- not run: ... -->``; its commands are parsed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import transformers

import peft_graft
import speech
import tiny
from conftest import needs_adapters
from peft_graft.cli import late
from peft_graft.study.read_study import read_study

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages whose code other tests run, in a place of its own.
ELSEWHERE = {"docs/extending.md": ("checkpoints/test_extending.py", "models/test_extending_families.py")}
#: After `make demo` tests/test_real.py runs the rest of README: what is about models of the demo.
DEMO = "out/demo"
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.M)
#: What is added to commands of a verb, and to calls that choose nothing, to spare time.
SHORT = {"transfer": ("--polish", "2", "--max-tokens", "600"), "align": ("--max-tokens", "600")}
SHORT_CONFIG = {"polish": 2, "max_tokens": 600}
NEED_ADAPTERS = ("docs/how-to/adapter-to-lora.md", "docs/export.md")
#: Folders that pages speak of, and how another page has made them.
MADE = {
    "out/graft": "peft-graft transfer my-lora --student Qwen/Qwen3-0.6B --text prompts.jsonl --out out/graft",
    "out/tags": "peft-graft transfer my-tagger --student small-encoder --text sentences.txt --out out/tags",
    "out/filter": "peft-graft transfer my-filter --student old-encoder --text sentences.txt --labels ham,spam "
    "--out out/filter",
    "out/likeness": "peft-graft transfer my-regressor --student old-encoder --out out/likeness",
    "out/answers": "peft-graft transfer my-answerer --student old-encoder --out out/answers",
    "out/as-peft": "peft-graft transfer my-adapters-lora --student small-encoder --text sentences.txt --library peft "
    "--out out/as-peft",
}
CHAT = "{% for m in messages %}{{ m['content'] }}{{ ' =' if m['role'] == 'user' else eos_token }}{% endfor %}"


class Block(NamedTuple):
    """A block of a page."""

    language: str
    code: str
    why_not: str | None


def pages() -> list[str]:
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(match["language"], match["code"], match["why"]) for match in BLOCK.finditer(text)]
    assert text.count("\n```") == 2 * len(found), f"{page}: a fence that is not closed, or not at the margin"
    return found


@pytest.fixture(scope="module")
def stage(world: Path, speakers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: models, modules and files by these names."""
    root = tmp_path_factory.mktemp("stage")
    for name, source in {
        "old-base": speakers / "teacher",
        "Qwen/Qwen3-0.6B": speakers / "stranger",
        "my-lora": speakers / "module",
        "old-encoder": world / "teacher",
        "small-encoder": world / "narrow",
        "my-tagger": world / "lora",
    }.items():
        shutil.copytree(source, root / name)
    for name in ("old-base", "Qwen/Qwen3-0.6B"):
        (root / name / "chat_template.jinja").write_text(CHAT)
        changed(root / name / "config.json", max_position_embeddings=512)
    changed(root / "my-lora" / "adapter_config.json", base_model_name_or_path=str(root / "old-base"))
    tiny.peft_lora(root / "my-classifier", world / "teacher", seed=2)
    tiny.peft_lora(root / "my-filter", world / "teacher", task="sequence-classification", labels=("ham", "spam"))
    tiny.peft_lora(root / "my-regressor", world / "teacher", task="sequence-classification", labels=("likeness",))
    _answerer(root / "my-answerer", world / "teacher")
    _loha(root / "my-loha", world / "teacher")
    if tiny.HAS_ADAPTERS:
        shutil.copytree(world / "pfeiffer", root / "my-adapter")
        tiny.adapterhub_module(root / "my-adapters-lora", world / "teacher", "lora")
    (root / "sentences.txt").write_text("\n".join(tiny.sentences(60)))
    for name in ("prompts.jsonl", "titles.jsonl"):
        speech.prompt_file(root / name, speech.words(44))
    lines = tiny.sentences(12, seed=4)
    rows = ({"tokens": line.split(), "ner_tags": ["B-PER"] + ["O"] * line.count(" ")} for line in lines)
    (root / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [f"{line},{('ham', 'spam')[number % 2]}" for number, line in enumerate(lines)]
    (root / "messages.csv").write_text(
        "\n".join(["id,message", *(f"{n},{line}" for n, line in enumerate(tiny.sentences(60)))])
    )
    pairs = [f"{line},{other},{number / 4}" for number, (line, other) in enumerate(pairwise(lines))]
    (root / "pairs.csv").write_text("\n".join(["first,second,score", *pairs]))
    (root / "labelled.csv").write_text("\n".join(["message,label", *labelled]))
    asked = ({"question": one, "context": text, "answers": [answer]} for one, text, answer in tiny.questions(12))
    (root / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    known = speech.words(12, seed=4)
    speech.prompt_file(root / "labelled.jsonl", known, [speech.answer(word) for word in known])
    return root


def changed(path: Path, **values: object) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _answerer(folder: Path, base: Path) -> None:
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"], r=2))
    tiny.randomise_trained(model, 1)
    model.save_pretrained(folder)


def _loha(folder: Path, base: Path) -> None:
    config = peft.LoHaConfig(task_type="TOKEN_CLS", target_modules=["query"], r=2)
    model = peft.get_peft_model(tiny.task_model(base), config)
    tiny.randomise(model, 1, ("hada_", "modules_to_save"))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=needs_adapters) if page in NEED_ADAPTERS else page for page in pages()],
)
def test_the_snippets_of_a_page(page: str, stage: Path, command: Callable[..., Any], monkeypatch) -> None:
    monkeypatch.chdir(stage)
    for verb in ("transfer", "transfer_all"):
        monkeypatch.setattr(peft_graft, verb, shortened(getattr(peft_graft, verb)))
    for folder, line in MADE.items():
        if folder in (ROOT / page).read_text(encoding="utf-8"):
            run_or_check(line, command, run=True)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        match block.language:
            case "bash" | "console":
                for line in commands(block):
                    run_or_check(line, command, run=block.why_not is None and DEMO not in block.code)
            case "python":
                if page not in ELSEWHERE and block.why_not is None and DEMO not in block.code:
                    for out in re.findall(r'out="([^"]+)"', block.code):
                        shutil.rmtree(out, ignore_errors=True)
                    exec(compile(block.code, page, "exec"), names)
            case "json":
                assert all(json.loads(line) for line in block.code.splitlines())
            case "toml":
                declared(block.code)
            case "text":
                pass
            case language:
                pytest.fail(f"{page}: a block of no known language, ```{language}")


def shortened(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ours that learns little where it is not said how much."""

    @wraps(verb)
    def called(*given: Any, **options: Any) -> Any:
        return verb(*given, **{"config": SHORT_CONFIG, **options})

    return called


def commands(block: Block) -> list[str]:
    """The commands of a block, each on one line."""
    lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run_or_check(line: str, command: Callable[..., Any], *, run: bool) -> None:
    """Run a command of ours, or see that it can be parsed; of others, see that what they name is there."""
    for words in _split(line):
        program, *rest = words
        if program == "peft-graft" and run:
            short = SHORT.get(rest[0], ()) if "--text" in rest else ()
            once(line, lambda rest=rest, short=short: command(*rest, *short))
        elif program == "peft-graft":
            verb, *options = rest
            late.with_options(verb).make_context(verb, options)
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"peft-graft\[([\w,-]+)\]", line)
            assert "peft-graft" in line or "--no-deps" in line
            assert {name for names in asked for name in names.split(",")} <= set(extras)
        elif program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif "python" in program and rest[0] == "-m":
            assert (ROOT / "src" / rest[1].replace(".", "/")).with_suffix(".py").exists() or rest[1] == "build", line
        elif "python" in program:
            assert (ROOT / rest[0]).exists(), line
        elif program != "torchrun":
            assert (ROOT / program).exists(), line


def once(line: str, run: Callable[[], object]) -> None:
    """Run a command unless another page has run the very same one in this folder."""
    done = Path(".done")
    lines = done.read_text().splitlines() if done.exists() else []
    words = " ".join(shlex.split(line, comments=True))
    if words not in lines:
        run()
        done.write_text("\n".join([*lines, words]))


def _split(line: str) -> list[list[str]]:
    """The words of each command of a line, which ``&&`` may join; what follows a number sign is a remark."""
    words, found = shlex.split(line, comments=True), [[]]
    for word in words:
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return found


def declared(code: str) -> None:
    """A study is read and lies there for the commands that follow; a task alone is one of its tasks."""
    text, path = code, Path("study.toml")
    if "[[grid]]" not in code:
        known = path.read_text()
        name = next(iter(tomllib.loads(code)["tasks"]))
        text = f"{known}\n{code}\n".replace('tasks = ["ner"]', f'tasks = ["{name}"]')
        text = text.replace('modules = ["lora", "adapter"]', 'modules = ["lora"]')
    path.write_text(text)
    read_study(path)
    path.write_text(code if "[[grid]]" in code else known)


def test_most_blocks_are_run() -> None:
    found = [block for page in pages() for block in blocks(page)]
    assert len([block for block in found if block.why_not]) <= 12
    assert len(found) > 50


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_that_other_tests_run_are_named_there(page: str) -> None:
    for test in ELSEWHERE[page]:
        assert Path(page).name in (ROOT / "tests" / test).read_text()
