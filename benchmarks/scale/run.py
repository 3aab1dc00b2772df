"""What moving a module must at least compute and hold, counted from the shapes of models: the tables of docs/scale.md.

    python benchmarks/scale/run.py [--markdown docs/scale.md] [--gpus 8] [--tflops 989] ...

No weights are needed and nothing is downloaded. ``shapes.py`` has the published sizes of real models, builds them on
torch's meta device, and runs a step of the polish on tensors that have shapes only, in models of two and of three
layers; what it computes and holds is linear in the layers. ``costs.py`` says how many texts are read, written and
learned from, by the package's own defaults. All rates are assumptions, and options.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers
from costs import (
    ANEW,
    GB,
    ROWS,
    Costs,
    Pair,
    Stage,
    Text,
    Way,
    aligning,
    checkpointing_needed,
    from_documents,
    from_prompts,
    from_sentences,
    gradients_passed,
    memory_of,
    passed_within_layers,
    seconds_of,
    tried_methods,
)
from shapes import ALL_LINEAR, GROWTH, LARGE, MIDDLE, QUERY_VALUE, SHAPES, Batch, Shape, parameters_of, whole_step

from peft_graft.config import GraftConfig

MARKS = "<!-- scale -->", "<!-- /scale -->"
#: A step of the polish.
LEARNING = Stage("a step", learned=ROWS)


class Rates(argparse.Namespace):
    """What the machine is taken to do; see the options."""

    def products(self, dtype: str) -> float:
        """Operations a second of matrix products."""
        peak = {"bfloat16": self.tflops, "float32": self.float32, "float64": self.float64}[dtype]
        return peak * self.utilisation * 1e12

    @property
    def between_gpus(self) -> float:
        """Bytes a second."""
        return self.link * self.link_share * GB


def parsed(arguments: Sequence[str] | None = None) -> Rates:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="page to write the tables into, between its marks")
    for name, default, what in (
        ("gpus", 8, "GPUs of the machine"),
        ("gpu-memory", 80.0, "of each, GB"),
        ("tflops", 989.0, "bfloat16 products of one at its best, TFLOP/s"),
        ("float32", 67.0, "float32 products, TFLOP/s"),
        ("float64", 67.0, "float64 products, TFLOP/s"),
        ("utilisation", 0.4, "share of these that is reached"),
        ("bandwidth", 3.35, "memory of one at its best, TB/s"),
        ("bandwidth-share", 0.6, "share of it that is reached where answers are written"),
        ("layer-ms", 0.5, "what starting a layer takes where answers are written, ms"),
        ("link", 450.0, "between GPUs at its best, one way, GB/s"),
        ("link-share", 0.7, "share of it that is reached"),
        ("host-link", 2.0, "sums over processes through the host (gloo), GB/s"),
        ("disk", 2.0, "weights from disk, GB/s"),
        ("assignment", 8.0, "seconds of an assignment of 8,192 units (docs/performance.md); they grow with the cube"),
        ("cores", 32, "of the host, for assignments"),
        ("processor", 0.1, "float32 products of two processor cores, TFLOP/s"),
        ("rank", 16, "of LoRAs"),
        ("prompt", 256, "tokens of a prompt"),
        ("answer", 128, "tokens of an answer"),
        ("longest", GraftConfig().max_new_tokens, "tokens that are written until all answers of a batch have ended"),
        ("document", 256, "tokens of a document"),
        ("sentence", 32, "tokens of a sentence"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} ({default:g})")
    return parser.parse_args(arguments, namespace=Rates())


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def short(value: float) -> str:
    """Three figures, two digits behind the point at most."""
    digits = min(2, max(0, 2 - math.floor(math.log10(value)))) if value > 0 else 0
    return "< 0.01" if 0 < value < 0.005 else f"{value:,.{digits}f}"


def named(names: Sequence[str], roles: Sequence[str], rates: Rates) -> Pair:
    return Pair(SHAPES[names[0]], SHAPES[names[1]], tuple(roles), rates.rank)


def models(rates: Rates) -> str:
    rows = []
    for shape in SHAPES.values():
        base, own = parameters_of(shape)
        loras = [
            whole_step(shape, Batch(2, 32, 16, bf16=shape.speaks), rates.rank, roles).lora / 1e6
            for roles in (QUERY_VALUE, shape.linear)
        ]
        rows.append([shape.name, f"{base + own:,}", short(2 * (base + own) / GB), *map(short, loras)])
    header = ["model", "values", "GB in bfloat16", f"LoRA r={rates.rank} on query, value, M", "on all linear layers, M"]
    return table(header, rows)


def layouts(rates: Rates) -> list[tuple[str, Pair, int, Way]]:
    """What the plan is made for: a name, models, texts in a step on each, and how GPUs work."""
    each = max(1, ROWS // rates.gpus)
    large, middle = (" → ".join(names) for names in (LARGE, MIDDLE))
    spread, alone, processes = Way("spread", rates.gpus), Way(), Way("processes", rates.gpus)
    return [
        (f"{large}, query and value, spread over {rates.gpus}", named(LARGE, QUERY_VALUE, rates), ROWS, spread),
        (f"{large}, all linear, spread over {rates.gpus}", named(LARGE, ALL_LINEAR, rates), ROWS, spread),
        (f"{middle}, all linear, on one", named(MIDDLE, ALL_LINEAR, rates), ROWS, alone),
        (f"{middle}, all linear, a process on each of {rates.gpus}", named(MIDDLE, ALL_LINEAR, rates), each, processes),
    ]


def memory(rates: Rates, text: Text) -> str:
    columns = {name: memory_of(pair, text, rows, way, rates) for name, pair, rows, way in layouts(rates)}

    def shown(line: str, value: float) -> str:
        over = line.startswith("**") and value > rates.gpu_memory * GB
        return f"{short(value / GB)}{', too much' if over else ''}"

    lines = next(iter(columns.values()))
    rows = [[line, *(shown(line, found[line]) for found in columns.values())] for line in lines]
    return table(["GB on the fullest GPU", *columns], rows)


def minutes(rates: Rates, text: Text) -> str:
    """Of a transfer by prompts."""
    (_, pair, rows, spread), _, (_, other, whole, alone), (_, _, each, processes) = layouts(rates)
    large, middle = (" → ".join(names) for names in (LARGE, MIDDLE))
    in_turn, at_once = f"layers spread over {rates.gpus} GPUs", f"were all layers cut over {rates.gpus}"
    return "\n\n".join(
        (
            minutes_of(large, pair, {in_turn: (spread, rows), at_once: (Way("cut", rates.gpus), rows)}, rates, text),
            minutes_of(
                middle, other, {"one GPU": (alone, whole), f"{rates.gpus} processes": (processes, each)}, rates, text
            ),
        )
    )


def minutes_of(name: str, pair: Pair, ways: dict[str, tuple[Way, int]], rates: Rates, text: Text) -> str:
    """By stage, where GPUs work in each of these ways, so many texts in a step on each."""
    stages = from_prompts(GraftConfig(), alike=pair.alike)
    columns = {}
    for said, (way, rows) in ways.items():
        full = checkpointing_needed(memory_of(pair, text, rows, way, rates), rates)
        costs = pair.costs(text, ["prune-align"] if pair.alike else [], rates, checkpointing=full)
        again = ANEW if full else ""
        work = [(costs.of_models(stage) + costs.of_products(stage)) / 1e15 for stage in stages]
        columns[f"PFLOP{again}"] = [0.0, *work, sum(work)]
        found = Way(way.name, way.count, full)
        taken = [pair.weights / rates.disk / GB]
        taken += [seconds_of(stage, costs, pair, text, found, rates) for stage in stages]
        columns[f"minutes, {said}{again}"] = [value / 60 for value in (*taken, sum(taken))]
    lines = ["reading weights", *(stage.name for stage in stages), "**all**"]
    rows = [[line, *map(short, values)] for line, *values in zip(lines, *columns.values(), strict=True)]
    return table([name, *columns], rows)


def traffic(rates: Rates, text: Text) -> str:
    """Of a step of the polish."""
    _, (_, large, rows, spread), (_, middle, _, _), _ = layouts(rates)
    cut = Way("cut", rates.gpus, checkpointing_needed(memory_of(large, text, rows, spread, rates), rates))
    states = 2 * 2 * ROWS * text.length * dict(large.student.sizes)["hidden_size"]
    weights = (rates.gpus - 1) / rates.gpus * 2 * 2 * sum(parameters_of(large.student))
    gradients = [gradients_passed(pair, text, cut) for pair in (large, middle)]
    fast, slow = rates.between_gpus, rates.host_link * GB
    names = [" → ".join(pair) for pair in (LARGE, MIDDLE)]
    rows_of = [
        [name, what, short(passed / GB), short(1e3 * passed / rate)]
        for name, what, passed, rate in (
            (names[0], "layers spread: hidden states and their gradients, at each border", states, fast),
            (names[0], "were layers cut: sums within them", passed_within_layers(LEARNING, large, text, cut), fast),
            (names[0], "were weights sharded: gathered in both directions", weights, fast),
            (names[0], "with those, gradients of the LoRA", gradients[0], fast),
            (names[1], "a process each: gradients of the LoRA, through the host", gradients[1], slow),
            (names[1], "the same, were they passed between the GPUs", gradients[1], fast),
        )
    ]
    return table(["LoRA on all linear layers", "what each GPU passes on", "GB", "ms"], rows_of)


def alignments(rates: Rates, text: Text) -> str:
    rows = []
    for names, way in ((LARGE, Way("spread", rates.gpus)), (MIDDLE, Way())):
        for what, roles in (("query, value", QUERY_VALUE), ("all linear", ALL_LINEAR)):
            for method in ("prune-align", "ridge"):
                pair = named(names, roles, rates)
                costs, stage = pair.costs(text, [method], rates), aligning(GraftConfig().max_tokens)[0]
                found = costs.statistics
                passes = found.passes(rates.gpu_memory * GB - pair.weights / way.holds)
                taken = seconds_of(stage, costs, pair, text, way, rates)
                rows.append([
                    " → ".join(names), what, method, short(costs.of_models(stage) / 1e15),
                    short(costs.of_products(stage) / 1e15), short(found.held / GB), passes, short(taken / 60),
                ])  # fmt: skip
    header = [
        "models",
        "sites",
        "method",
        "PFLOP reading once",
        "PFLOP of products",
        "GB of totals",
        "passes",
        "minutes",
    ]
    return table(header, rows)


def growth(rates: Rates, text: Text) -> str:
    """Of each verb, what it takes at the least."""
    rates, rows = Rates(**{**vars(rates), "layer_ms": 0.0, "assignment": 0.0}), []
    for shape in map(SHAPES.__getitem__, GROWTH):
        pair = Pair(shape, shape, QUERY_VALUE, rates.rank)
        for verb, given, stages, methods in verbs(shape):
            whole = Text(rates.document, rates.document - 1) if shape.speaks else Text(rates.sentence)
            read = text if given == "prompts" else whole
            costs = pair.costs(read, methods, rates)
            rows.append([shape.name, verb, given, *counts(stages, read), *work(stages, costs, pair, read, rates)])
    header = ["model", "verb", "given", "read", "learned from", "written", "TFLOP reading", "learning", "writing",
              "products", "processor, s", "GPU, s"]  # fmt: skip
    return table(header, rows)


def verbs(shape: Shape) -> Iterator[tuple[str, str, list[Stage], Sequence[str]]]:
    """Each verb, what it is given, and the methods whose statistics it needs."""
    config, without, tried = GraftConfig(), GraftConfig(polish=0), tried_methods()
    plain = from_documents if shape.speaks else from_sentences
    what = "documents" if shape.speaks else "sentences"
    yield "align (prune-align)", what, aligning(config.max_tokens), ["prune-align"]
    yield "transfer --polish 0", what, plain(without, shape.layers), tried
    yield "transfer", what, plain(config, shape.layers), tried
    if shape.speaks:
        yield "transfer", "prompts", from_prompts(config), []


def counts(stages: Sequence[Stage], text: Text) -> Iterator[str]:
    """Thousands of tokens that are read by either model, learned from and written."""
    tokens = sum(2 * stage.tokens + (stage.teacher + stage.student) * text.length for stage in stages)
    learned = sum(stage.learned + stage.started for stage in stages) * text.length
    yield from (f"{value / 1e3:,.0f} k" for value in (tokens, learned, sum(s.written for s in stages) * text.answer))


def work(stages: Sequence[Stage], costs: Costs, pair: Pair, text: Text, rates: Rates) -> Iterator[str]:
    """Operations by what they are for, and seconds that they take at the least on a processor and on a GPU."""
    read = sum(s.teacher * costs.teacher + s.student * costs.student + s.tokens * costs.tokens for s in stages)
    learned = sum(stage.learned * costs.learn + stage.started * costs.start for stage in stages)
    written = sum(stage.written * costs.student for stage in stages)
    products = sum(map(costs.of_products, stages))
    yield from (short(value / 1e12) for value in (read, learned, written, products))
    yield short((read + learned + written + products) / rates.processor / 1e12)
    yield short(sum(seconds_of(stage, costs, pair, text, Way(), rates) for stage in stages))


def page(rates: Rates) -> str:
    text = Text(rates.prompt + rates.answer, rates.answer)
    parts = {
        "Models": models(rates),
        "Memory": memory(rates, text),
        "Time of a transfer by prompts": minutes(rates, text),
        "Traffic": traffic(rates, text),
        "Alignments": alignments(rates, text),
        "Growth": growth(rates, text),
    }
    return "\n\n".join(f"### {title}\n\n{made}" for title, made in parts.items())


def main() -> None:
    rates = parsed()
    transformers.logging.set_verbosity_error()
    text = page(rates)
    print(text)
    if rates.markdown:
        whole = rates.markdown.read_text(encoding="utf-8")
        before, rest = whole.split(MARKS[0])
        rates.markdown.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
