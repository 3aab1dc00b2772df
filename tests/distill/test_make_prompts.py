"""Prompts made from examples: what is read from a continuation, what is left out, and a transfer with nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers

import speech
import tiny
from peft_graft import Callback, Graft
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.cli.display import show_inspection
from peft_graft.cli.result import show_graft
from peft_graft.distill.excess import excess_of
from peft_graft.distill.generate import Answer, AnswerStore
from peft_graft.distill.make_prompts import BATCH, Listing, MadePrompts, Writer, make_prompts
from peft_graft.errors import PlanError, TextError
from peft_graft.models.loading import load_model
from peft_graft.prompts.conversation import Message, Prompt
from peft_graft.prompts.seeds import Seeds, Unlike
from peft_graft.prompts.template import Template
from peft_graft.run import Run

EXAMPLES = ("Add milk to my list", "Play some jazz in the kitchen", "Will it rain in Oslo?", "Book a table for two")
BLOCKS = ("Sort these:\nb\na", "Count these:\nx\ny\nz", "Reverse this:\nabc")
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}<assistant>"
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def items(said: str, seeds: Sequence[str] = EXAMPLES, *, whole: bool = True, chat: bool = True) -> list[str]:
    return Seeds(tuple(seeds)).items(said, whole=whole, chat=chat)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Sure! Here are more:\n\n1. Turn on the light\n2) Stop it\n(3) Go\n\nAnything else?",
         ["Turn on the light", "Stop it", "Go"]),
        ("- one\n* two\n• three", ["one", "two", "three"]),
        ('1. "Call Ann"\n2. **Call Bob**\n3. “Call Cy”\n4. "A" or "B"',
         ["Call Ann", "Call Bob", "Call Cy", '"A" or "B"']),
        ("<think>1. no</think>\n1. yes", ["yes"]),
        ("Of course:\nfirst\n\nsecond\n", ["first", "second"]),
        ("1. two lines\nof one\n2. 10:30 please\n3. -5 is cold", ["two lines\nof one", "10:30 please", "-5 is cold"]),
        ("", []),
    ],
)  # fmt: skip
def test_items_of_a_list(said: str, found: list[str]) -> None:
    assert items(said) == found


def test_a_list_that_goes_on_from_the_number_that_was_given() -> None:
    assert items(" Call Ann\n6. Call Bob\n7. Cal", whole=False, chat=False) == ["Call Ann", "Call Bob"]
    assert items("5 apples\n6. pears", chat=False) == ["5 apples", "pears"]


def test_a_last_item_that_may_be_cut_is_left_out() -> None:
    assert items("1. Call Ann\n2. Call B", whole=False) == ["Call Ann"]
    assert items("1. Call Ann\n2. Call Bob\n", whole=False) == ["Call Ann", "Call Bob"]
    assert items("Call A", whole=False) == []


def test_examples_of_several_lines_are_set_apart_by_a_line() -> None:
    seeds = Seeds(BLOCKS)
    assert seeds.separator == "###"
    assert seeds.request(BLOCKS[:2], chat=False) == "Sort these:\nb\na\n###\nCount these:\nx\ny\nz\n###\n"
    assert items("Sum:\n1\n2\n###\nHalve:\n8\n###\nDou", BLOCKS, whole=False, chat=False) == [
        "Sum:\n1\n2",
        "Halve:\n8",
    ]
    assert items("Here they are:\n###\n1. Sum:\n1\n ### \nHalve:\n8", BLOCKS) == ["Sum:\n1", "Halve:\n8"]
    assert Seeds(("# a\n###\nb", "c", "d")).separator == "====="


def test_requests() -> None:
    seeds = Seeds(EXAMPLES)
    assert seeds.request(EXAMPLES[:2], chat=False) == (
        "1. Add milk to my list\n2. Play some jazz in the kitchen\n3."
    )  # fmt: skip
    assert "1. Add milk to my list\n2. Play" in seeds.request(EXAMPLES[:2], chat=True)


def test_lengths() -> None:
    seeds = Seeds(("x" * 10, "y" * 20, "z" * 12))
    assert [seeds.misfit("a" * size) for size in (2, 3, 60, 61)] == ["wrong_length", None, None, "wrong_length"]


def test_shape() -> None:
    seeds = Seeds(("name[The Mill], area[north]", "name[Aromi], food[French]", "name[Alimentum], area[city]"))
    assert seeds.misfit("name[Strada], price[high]") is None
    for bad in ("food[Thai], price[high]", "name[Strada], price", "name[Strada],\narea[city]"):
        assert seeds.misfit(bad) == "wrong_shape"
    # A letter that all words happen to share is no shape.
    assert Seeds(("What is it", "Where is it", "Who was that")).misfit("How is that") is None
    assert Seeds(("Is it 7?", "Are they 8?", "Am I 9?")).misfit("Are we ten?") is None


def brute_force(first: list[str], second: list[str]) -> int:
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def test_what_is_alike_by_rouge_l_is_kept_once() -> None:
    """As by the table of longest common subsequences, against every text that was kept before."""
    draw = random.Random(0)
    texts = [" ".join(draw.choice("abcdef") for _ in range(draw.randint(1, 9))) for _ in range(400)]
    found, kept = Unlike([], 0.7), list[list[str]]()
    for text in texts:
        words = text.split()
        new = all(2 * brute_force(words, other) < 0.7 * (len(words) + len(other)) for other in kept)
        assert found.add(text) == new
        kept += [words] * new
    assert 20 < len(kept) < 300


def test_words_that_all_examples_have_tell_nothing_apart() -> None:
    found = Unlike(["What is the capital of France?", "What is the capital of Peru?", "What is the capital of Chad?"])
    assert found.add("What is the capital of Spain?")
    assert not found.add("what is the capital of SPAIN")
    assert not found.add("What is the capital of Peru?")
    assert Unlike([]).add("!?")
    assert Unlike(["!?"]).add("?!...")
    assert not Unlike(["今天天气怎么样", "放一首歌"]).add("今天天气怎么样呢")


def lister(record: list[int] | None = None, stop_at: int | None = None, *, words: Sequence[str] = WORDS):
    """Goes on with any list, with words of its own."""

    def write(requests: Sequence[str], batch: int) -> list[Answer]:
        if batch == stop_at:
            raise KeyboardInterrupt
        if record is not None:
            record.append(batch)
        found = []
        for number, request in enumerate(requests):
            draw = random.Random(f"{batch} {number} {request}")
            said = [f"{n}. {draw.choice(words)} {draw.choice(words)} {draw.choice(words)}" for n in range(1, 5)]
            found.append(Answer("\n".join([*said, f"5. {'long ' * 90}", "6. cut"]), ended=False))
        return found

    return Writer(write, chat=True)


def test_made_until_there_are_enough() -> None:
    batches, told = list[int](), list[tuple[int, int]]()
    prompts, record = make_prompts(
        Seeds(EXAMPLES, system="Be brief"), lister(batches), 100, progress=lambda *now: told.append(now)
    )
    assert len(prompts) == len(set(prompts)) == record.kept == 100
    assert prompts[0].messages[0] == Message("system", "Be brief")
    assert record.ended == "enough"
    assert record.continuations == BATCH * len(batches) == BATCH * len(told)
    assert record.made == 100 + record.duplicates + record.wrong_length + record.wrong_shape
    assert record.wrong_length > 10
    assert told[-1] == (100, 100)


def test_the_end_of_what_there_is_to_say_is_the_end() -> None:
    prompts, record = make_prompts(Seeds(EXAMPLES), lister(words=WORDS[:3]), 500)
    assert record.ended == "nothing new"
    assert 0 < len(prompts) == record.kept < 40
    with pytest.raises(TextError, match=r"too few prompts could be made.*at least 40.*duplicates.*Fix: give more"):
        make_prompts(Seeds(EXAMPLES), lister(words=WORDS[:3]), 500, least=40)
    silent = Writer(lambda requests, batch: [Answer("", True)] * len(requests), chat=False)
    with pytest.raises(TextError, match="found 0 of 0 that were made"):
        make_prompts(Seeds(EXAMPLES), silent, 500)


def test_an_interrupted_making_goes_on_to_the_same_prompts(tmp_path: Path) -> None:
    undisturbed = make_prompts(Seeds(EXAMPLES), lister(), 200, seed=3)
    assert undisturbed != make_prompts(Seeds(EXAMPLES), lister(), 200, seed=4)
    store = AnswerStore(tmp_path, "made", "key")
    with pytest.raises(KeyboardInterrupt):
        make_prompts(Seeds(EXAMPLES), lister(stop_at=2), 200, seed=3, store=store)
    with store.path.open("a") as file:  # and a batch that a kill cut off
        file.write(json.dumps({"prompt": 2 * BATCH, "text": "1. lost", "ended": True}) + '\n{"prompt": 3')
    batches = list[int]()
    assert make_prompts(Seeds(EXAMPLES), lister(batches), 200, seed=3, store=store) == undisturbed
    assert batches[0] == 2
    again = list[int]()
    assert make_prompts(Seeds(EXAMPLES), lister(again), 200, seed=3, store=store) == undisturbed
    assert again == []


def test_a_model_with_a_chat_template_is_asked_and_another_goes_on() -> None:
    tokenizer = speech.byte_level()
    seeds = Seeds(EXAMPLES)
    listing = Listing.of(Template(tokenizer, format="Q: {prompt}", system="x"), seeds, 1 << 20)
    assert not listing.chat
    assert listing.examples == 4
    assert tokenizer.decode(listing.template.ids(Prompt.of_text("1. a"))) == "1. a"
    tokenizer.chat_template = CHAT
    listing = Listing.of(Template(tokenizer, format="Q: {prompt}", system="x"), seeds, 1 << 20)
    assert listing.chat
    assert tokenizer.decode(listing.template.ids(Prompt.of_text("1. a"))) == "<user>1. a<end><assistant>"


def test_a_model_that_reads_little_is_shown_fewer_examples() -> None:
    template = Template(speech.byte_level(), format="{prompt}")
    few = Listing.of(template, Seeds(EXAMPLES), 120)
    assert few.examples == 2
    assert 30 < few.tokens <= 60
    with pytest.raises(TextError, match=r"too long to show them to the model.*at most 20 tokens"):
        Listing.of(template, Seeds(EXAMPLES), 40)


@pytest.mark.parametrize("name", ["s.jsonl", "s.txt"])
def test_examples_in_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps({"prompt": one}) if name == "s.jsonl" else one for one in EXAMPLES))
    found = Seeds.of(path)
    assert sorted(found.texts) == sorted(EXAMPLES)
    assert (found.name, found.system) == (str(path), None)
    assert sorted(Seeds.of(iter(EXAMPLES)).texts) == sorted(EXAMPLES)
    assert Seeds.of(EXAMPLES).key == found.key != Seeds.of(EXAMPLES[:3]).key


def test_examples_that_are_none() -> None:
    turn = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}]
    for given, why in (
        ([], "at least 3, better 5 to 15, found 0"),
        (["a", "b", "b"], "at least 3, better 5 to 15, found 2"),
        ([f"question {n}" for n in range(101)], r"found 101.*Fix: give them with --text"),
        ([*EXAMPLES, {"messages": turn}], "found user, assistant, user"),
        ([{"instruction": f"q{n}", "system": f"s{n}"} for n in range(4)], "several system messages"),
    ):
        with pytest.raises(TextError, match=why):
            Seeds.of(given)


def test_excess_is_by_how_much_the_module_makes_the_answer_likelier(world: Path) -> None:
    handle = load_model(str(world / "teacher"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    template = Template(tokenizer, format=speech.FORMAT)
    sides = [template.encode(Prompt.of_text(word), says(word)) for word in speech.words(5) for says in
             (speech.answer, known)]  # fmt: skip
    found = excess_of(attach(read_checkpoint(world / "module"), handle, speaks=True), template, sides, Run())
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, world / "module").eval()
    for value, side in zip(found, sides, strict=True):
        ids = torch.tensor([side.ids])
        with torch.inference_mode():
            own = model(input_ids=ids).logits[0]
            with model.disable_adapter():
                bare = model(input_ids=ids).logits[0]
        gain = (own.log_softmax(-1) - bare.log_softmax(-1))[:-1].gather(1, ids[0, 1:, None])[side.start - 1 :]
        assert value == pytest.approx(float(gain.mean()), abs=1e-4)
    assert min(found[::2]) > 0 > max(found[1::2])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher that also goes on with lists of words, a student of another make, and the teacher's module."""
    root = tmp_path_factory.mktemp("seeds")
    speech.language_model(root / "teacher", speech.byte_level(speech.MERGED), seed=1, steps=0)
    learn_lists(root / "teacher")
    speech.language_model(root / "student", speech.sentence_piece(), seed=2, steps=0)
    speech.lora(root / "module", root / "teacher", steps=80)
    (root / "seeds.txt").write_text("\n".join(speech.words(6, seed=5)))
    return root


def known(word: str) -> str:
    """What the teacher answers without the module."""
    return f"{word[:2]}hg"


def learn_lists(folder: Path, steps: int = 150) -> None:
    """Train a model on numbered lists of words, and on answers of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    for step in range(steps):
        drawn = [speech.words(8, seed=16 * step + row) for row in range(16)]
        texts = ["\n".join(f"{n}. {word}" for n, word in enumerate(words, start=1)) for words in drawn]
        texts += [speech.FORMAT.format(prompt=word) + known(word) + speech.END for word in drawn[0]]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(batch["input_ids"], labels=labels).loss.backward()  # padded on the right: no mask is needed
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def moved(world: Path, **options):
    settings = {
        "student": world / "student", "seeds": world / "seeds.txt", "format": speech.FORMAT, "max_new_tokens": 16,
        "make_prompts": 60, "polish": 4, "method": "fresh",
    }  # fmt: skip
    return tiny.transfer(world / "module", **(settings | options))


@pytest.fixture(scope="module")
def graft(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Graft:
    """What comes of examples at one go."""
    return moved(world, out=tmp_path_factory.mktemp("alone") / "graft")


def test_a_transfer_from_examples_alone(world: Path, graft: Graft, capsys: pytest.CaptureFixture[str]) -> None:
    report = graft.report
    made = report.prompts.made
    assert isinstance(made, MadePrompts)
    assert made.seeds == 6
    assert 40 <= made.kept <= 60
    assert report.prompts.prompts + report.prompts.held_out + report.prompts.no_excess == made.kept
    assert report.prompts.module_effect > 0.5
    seeds = set((world / "seeds.txt").read_text().split())
    assert all(len(sample.prompt) >= 2 and sample.prompt not in seeds for sample in report.answers)
    show_graft(report, graft.folder)
    assert made.text in " ".join(capsys.readouterr().out.split())
    assert f"{made.kept} prompts were made" in (graft.folder / "README.md").read_text()


class Stop(Callback):
    """Ends a run in the middle of making prompts."""

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        if stage == "making prompts" and done:
            raise KeyboardInterrupt


def test_an_interrupted_transfer_makes_the_same_prompts(world: Path, graft: Graft, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        moved(world, out=tmp_path / "stopped", callbacks=[Stop()])
    assert list((tmp_path / "stopped.unfinished").glob("made-prompts-*.jsonl"))
    resumed, undisturbed = moved(world, out=tmp_path / "stopped").report, graft.report
    assert resumed.prompts == undisturbed.prompts
    assert [one.prompt for one in resumed.answers] == [one.prompt for one in undisturbed.answers]


def test_inspect_says_what_would_be_made(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tiny.inspect(
        world / "module", world / "student", seeds=world / "seeds.txt", format=speech.FORMAT, max_new_tokens=16
    )
    show_inspection(whole)
    assert "500 to make from 6 examples, by the teacher's base, going on with a list" in " ".join(
        capsys.readouterr().out.split()
    )
    found = whole.student
    assert found.problem is None
    assert found.prompts.prompts == 500
    assert (found.prompts.made_from, found.prompts.made_by) == (6, "list")


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"text": ["a"]}, PlanError, "--seeds: prompts are made where there are none.*not both"),
        ({"seeds": ["abcd", "efgh"]}, TextError, "too few examples"),
        ({"make_prompts": 20}, PlanError, "--make-prompts.*at least 40, found 20"),
        ({"max_prompts": 30}, PlanError, "--max-prompts.*at least 40, found 30"),
        ({"max_length": 20}, TextError, "an example is longer than the models read"),
    ],
)
def test_refusals_before_weights(world: Path, options: dict, error: type, why: str) -> None:
    begun = list[str]()

    class Stages(Callback):
        def on_stage_begin(self, stage: str) -> None:
            begun.append(stage)

    with pytest.raises(error, match=why) as refusal:
        moved(world, **options, callbacks=[Stages()])
    assert not begun
    settings = {"student": world / "student", "seeds": world / "seeds.txt", "format": speech.FORMAT}
    settings |= {"max_new_tokens": 16, **options}
    assert tiny.inspect(world / "module", **settings).student.problem == str(refusal.value)


def test_a_module_that_changes_nothing_leaves_no_prompts(world: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=1e-6)
    adapted.save_pretrained(tmp_path / "idle")
    with pytest.raises(TextError, match="no likelier"):
        tiny.transfer(
            tmp_path / "idle", student=world / "student", seeds=world / "seeds.txt", format=speech.FORMAT,
            max_new_tokens=16, make_prompts=60,
        )  # fmt: skip
