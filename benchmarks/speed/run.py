"""What alignment and transfer cost: over the limit of the machine, over the straightforward way, and as inputs grow.

    python benchmarks/speed/run.py --models MODELS --text TEXT --out out/speed [--parts ...] [--threads N]

MODELS holds the folders named below, TEXT is a file that ``peft-graft align`` reads. Every measurement is one JSON file
in OUT, with the machine, the versions and the command; those that exist are not repeated, so an interrupted run goes
on. ``report.py`` makes the tables from those files alone.

Parts: ``limit`` (wall time of ``align`` over bare forward passes and the needed products), ``stage`` (statistics and
assignment over one correlation a unit), ``assignment`` (solvers, up to 8192 units; lapx where it is installed),
``memory`` (peak over tokens), ``growth`` (tokens, width, depth, sites),
``tokens`` (how good assignments are on other text, over the tokens they are from and in bfloat16), ``process`` (whole
commands), ``gpu`` (the limit on CUDA, where there is one).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import transformers
from scipy.optimize import linear_sum_assignment

from peft_graft import AlignConfig, align
from peft_graft.alignment import collect as collecting
from peft_graft.alignment.layout import SAMPLE_SPACES
from peft_graft.alignment.methods import METHODS
from peft_graft.alignment.methods.prune_align import assign_by_correlation
from peft_graft.alignment.moments import Products
from peft_graft.alignment.text import read_text
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.environment import hardware, versions
from peft_graft.models.loading import ModelPair
from peft_graft.models.pair import load_pair
from peft_graft.models.spaces import GLOBAL_SPACES, TOKENS_OUT
from peft_graft.planning.spaces import directions_of_roles, spaces_of_roles

L6, L3, E5 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "multilingual-e5-small"
QUERY_VALUE = ("attn.query", "attn.value")
LINEAR = ("attn.query", "attn.key", "attn.value", "attn.output", "ffn.up", "ffn.down")
SITES = {"query, value": QUERY_VALUE, "all linear": LINEAR}
PARTS = ("limit", "stage", "assignment", "memory", "growth", "tokens", "process", "gpu")
OTHER_TEXT = 1500  # sentences that assignments are judged on


def busy():
    """Share of one core that other processes took in the last minute, as far as the load says."""
    return os.getloadavg()[0]


class Bench:
    def __init__(self, args):
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)

    def once(self, name, measure):
        """Measure, unless it has been measured."""
        path = self.out / f"{name.replace(', ', '+').replace(' ', '_')}.json"
        if path.exists():
            return json.loads(path.read_text())
        load = busy()
        record = {
            "name": name, **measure(), "load_before": load, "versions": versions(), "hardware": hardware("cpu"),
            "processor": processor(), "command": shlex.join([Path(sys.argv[0]).name, *self.args.shown]),
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        shown = {key: round(value, 3) for key, value in record.items() if isinstance(value, float)}
        print(f"{name}: {shown}", flush=True)
        return record

    def model(self, name):
        return str(self.args.models / name)

    # ---- (a) over the limit ------------------------------------------------------------------------------------------

    def limit(self, device="cpu", dtype="float32"):
        mark = "" if device == "cpu" else f" {device} {dtype}"
        for first, second in ((L6, E5), (E5, L6)):
            for sites, roles in SITES.items():
                for method in ("prune-align", "ridge") if sites == "query, value" else ("prune-align",):
                    for repetition in range(self.args.repetitions):
                        self.once(
                            f"limit {first} {second} {sites} {method}{mark} {repetition}",
                            lambda f=first, s=second, r=roles, m=method: self.over_limit(f, s, r, m, device, dtype),
                        )

    def over_limit(self, first, second, roles, method, device="cpu", dtype="float32", tokens=None):
        tokens = tokens or self.args.tokens
        config = AlignConfig(sites=roles, method=method, max_tokens=tokens, device=device, dtype=dtype)
        models = load_pair(self.model(first), self.model(second), config, tokenizers=True)
        batches = list(prepared(models, self.args.text, tokens))
        # Half of the passes before and half after what they are compared with, for a machine's speed drifts.
        forwards = bare(models, batches[::2], device)
        start = time.perf_counter()
        align(self.model(first), self.model(second), text=self.args.text, config=config)
        wall = time.perf_counter() - start
        forwards += bare(models, batches[1::2], device)
        rows = sum(batch.gather_teacher.count for batch in batches)
        samples = sum(len(batch.teacher["input_ids"]) for batch in batches)
        flops, precise = needed(models, roles, method, rows, samples)
        rate = matmul_rate(torch.float64 if precise else torch.float32, device)
        products = flops / rate
        return {
            "teacher": first, "student": second, "sites": list(roles), "method": method, "device": device,
            "dtype": dtype, "tokens": rows, "wall": wall, "forwards": forwards, "products": products, "rate": rate,
            "over_limit": wall / (forwards + products), "over_forwards": wall / forwards,
        }  # fmt: skip

    # ---- (b) statistics and assignment -------------------------------------------------------------------------------

    def stage(self):
        self.once("stage", lambda: stage(768, 1024, 20_000))

    def assignment(self):
        for units in (512, 1024, 2048, 4096, 8192):
            for related in (True, False):
                name = f"assignment {units} {'copy' if related else 'others'}"
                self.once(name, lambda units=units, related=related: assigned(units, related))

    # ---- (c) memory --------------------------------------------------------------------------------------------------

    def memory(self):
        text = self.long_text(max(self.args.memory_tokens))
        for tokens in self.args.memory_tokens:
            self.once(f"memory {tokens}", lambda tokens=tokens: self.child("peak", str(text), str(tokens)))

    def long_text(self, tokens):
        """The text again and again in another order, until there are enough words."""
        path = self.out / "long.txt"
        if not path.exists():
            words, turn = 0, 0
            with path.with_suffix(".partial").open("w") as file:
                while words < tokens:
                    for sample in read_text(self.args.text, seed=turn):
                        file.write(" ".join(" ".join(sample.texts).split()) + "\n")
                        words += len(sample.first.split())
                    turn += 1
            path.with_suffix(".partial").rename(path)
        return path

    def child(self, *arguments):
        """A measurement in a process of its own."""
        command = [sys.executable, __file__, "--models", str(self.args.models), "--text", str(self.args.text),
                   "--out", str(self.out), "--threads", str(self.args.threads), "--child", *arguments]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def peak(self, text, tokens):
        start = time.perf_counter()
        config = AlignConfig(sites=QUERY_VALUE, max_tokens=int(tokens))
        found = align(self.model(L6), self.model(L3), text=text, config=config)
        return {
            "tokens": found.details["pairing"]["pairs"],
            "peak_mib": peak_mib(),
            "wall": time.perf_counter() - start,
        }

    # ---- (d) growth --------------------------------------------------------------------------------------------------

    def growth(self):
        base = {"width": 256, "depth": 4, "tokens": 20_000, "sites": 2}
        for axis, values in (("tokens", (10_000, 20_000, 40_000, 80_000)), ("width", (128, 256, 512, 1024)),
                             ("depth", (2, 4, 8, 16)), ("sites", (1, 2, 4, 6))):  # fmt: skip
            for value in values:
                point = {**base, axis: value}
                name = " ".join(f"{key}{number}" for key, number in point.items())
                self.once(f"growth {name}", lambda point=point: {**point, **self.grown(**point)})

    def grown(self, width, depth, tokens, sites):
        model = str(self.random_model(width, depth))
        models = load_pair(model, model, AlignConfig(), tokenizers=True)
        roles = LINEAR[:sites]
        pairs = spaces_of_roles(models.teacher.architecture, models.student.architecture, roles=roles)
        wanted = dict.fromkeys(pairs, ())
        settings = collecting.CollectionSettings(max_tokens=tokens)
        begin = time.perf_counter()
        statistics, _ = collecting.collect(models, read_text(self.args.text), wanted, settings)
        middle = time.perf_counter()
        for fit, held_out in statistics.values():
            assign_by_correlation(fit, held_out)
        return {"pass": middle - begin, "solve": time.perf_counter() - middle}

    def random_model(self, width, depth):
        folder = self.out / "models" / f"{width}-{depth}"
        if not (folder / "config.json").exists():
            config = transformers.AutoConfig.from_pretrained(self.model(L3))
            config.hidden_size, config.intermediate_size = width, 4 * width
            config.num_hidden_layers, config.num_attention_heads = depth, width // 32
            transformers.AutoTokenizer.from_pretrained(self.model(L3)).save_pretrained(folder)
            torch.manual_seed(0)
            transformers.AutoModel.from_config(config).save_pretrained(folder)
        return folder

    # ---- tokens that an assignment needs ---------------------------------------------------------------------------

    def tokens(self):
        for tokens in (3_000, 6_000, 12_000, 25_000, 50_000):
            self.once(f"tokens {tokens} float32", lambda tokens=tokens: self.matched(tokens, "float32"))
        self.once("tokens 50000 bfloat16", lambda: self.matched(50_000, "bfloat16"))

    def matched(self, tokens, dtype):
        """Correlation of matched units on text that the assignments are not from, by space: mean over layers."""
        statistics = self.moments(E5, L6, slice(OTHER_TEXT, None), tokens, dtype)
        found = defaultdict(list)
        for pair, (fit, _) in statistics.items():
            columns = assign_by_correlation(fit)[0].indices
            matched = (columns >= 0).nonzero().squeeze(1)
            other = self.on_other_text[pair][0].correlation()
            found[pair[1].name].append(float(other[matched, columns[matched]].mean()))
        return {"tokens": tokens, "dtype": dtype, "matched": {name: fmean(values) for name, values in found.items()}}

    @cached_property
    def on_other_text(self):
        return self.moments(E5, L6, slice(OTHER_TEXT), 10**9, "float32")

    def moments(self, first, second, part, tokens, dtype):
        models = load_pair(self.model(first), self.model(second), AlignConfig(dtype=dtype), tokenizers=True)
        planned = spaces_of_roles(models.teacher.architecture, models.student.architecture, roles=LINEAR)
        pairs = [pair for pair in planned if pair[1].name not in SAMPLE_SPACES]  # of which tokens say little
        samples = islice(read_text(self.args.text), part.start, part.stop)
        settings = collecting.CollectionSettings(max_tokens=tokens)
        return collecting.collect(models, samples, dict.fromkeys(pairs, ()), settings)[0]

    # ---- whole commands ----------------------------------------------------------------------------------------------

    def process(self):
        text = self.out / "thousand.txt"
        if not text.exists():
            samples = read_text(self.args.text)
            text.write_text("\n".join(" ".join(next(samples).first.split()) for _ in range(1000)) + "\n")
        lora, adapter = self.module("lora"), self.module("adapter")
        to_l3 = ["--student", self.model(L3), "--text", text, "--method", "prune-align", "--polish", "0",
                 "--head", "carry", "--out", self.out / "small"]  # fmt: skip
        alignment = self.out / "alignment"
        if not alignment.exists():
            config = AlignConfig(sites=QUERY_VALUE, max_tokens=10_000)
            align(self.model(L6), self.model(E5), text=self.args.text, out=alignment, config=config)
        to_e5 = ["--student", self.model(E5), "--alignment", alignment, "--out", self.out / "second"]
        common = ["--teacher", self.model(L6), "--force", "--json"]
        commands = {
            "transfer": ["transfer", lora, *common, *to_l3],
            "bfloat16": ["transfer", lora, *common, *to_l3, "--dtype", "bfloat16"],
            "adapter": ["transfer", adapter, *common, *to_l3],
            "adapter-bfloat16": ["transfer", adapter, *common, *to_l3, "--dtype", "bfloat16"],
            "aligned": ["transfer", lora, *common, *to_e5],
            "imports": None,
        }
        for repetition in range(self.args.repetitions):
            for name, arguments in commands.items():
                self.once(f"process {name} {repetition}", lambda arguments=arguments: command(arguments))

    def module(self, kind):
        """A LoRA of peft's or a Pfeiffer adapter of AdapterHub's for named entities on L6, of random weights."""
        folder = self.out / kind
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if kind == "lora":
            import peft

            model = transformers.AutoModelForTokenClassification.from_pretrained(self.model(L6), num_labels=9)
            config = peft.LoraConfig(task_type="TOKEN_CLS", r=8, target_modules=["query", "value"])
            adapted, trained = peft.get_peft_model(model, config), ("lora_", "classifier")
            save = adapted.save_pretrained
        else:
            import adapters

            adapted, trained = adapters.AutoAdapterModel.from_pretrained(self.model(L6)), ("adapters.", "heads.")
            adapted.add_adapter("tags", config="seq_bn")
            adapted.add_tagging_head("tags", num_labels=9)
            save = functools.partial(adapted.save_adapter, adapter_name="tags", with_head=True)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if any(mark in name for mark in trained):
                    value.normal_(0, 0.05)
        save(folder)
        return folder

    def gpu(self):
        if not torch.cuda.is_available():
            print("no CUDA here: the GPU part is left out")
            return
        for dtype in ("float32", "bfloat16"):
            self.limit("cuda", dtype)


def prepared(models: ModelPair, text, tokens):
    """The batches of the pass, as it would make them."""
    settings = collecting.CollectionSettings(max_tokens=tokens)
    batches = collecting._batches(models, read_text(text), settings, PairingCounts())
    return (collecting._prepare(models, batch) for batch in batches)


def bare(models: ModelPair, batches, device):
    """Seconds of the forward passes of both models alone."""
    teacher, student = models.teacher, models.student
    with torch.inference_mode():
        teacher.base(**batches[0].teacher)
        synchronise(device)
        start = time.perf_counter()
        for batch in batches:
            teacher.base(**batch.teacher)
            student.base(**batch.student)
        synchronise(device)
        return time.perf_counter() - start


def needed(models: ModelPair, roles, method, rows, samples):
    """Floating-point operations of the products that sites and method need, each distinct one once, and whether they
    must be float64; a symmetric one counts half."""
    pairs = spaces_of_roles(models.teacher.architecture, models.student.architecture, roles=roles)
    directions = directions_of_roles(models.student.architecture, roles)
    wanted = {pair: METHODS[method].moments_for(directions.get(pair[1].name, ("read", "write"))) for pair in pairs}
    totals = collecting.empty_totals(models, wanted, hold_out=False)
    flops = 0
    for (_, group), products in totals.products.items():
        count = samples if group.split()[1] in GLOBAL_SPACES and not group.endswith(TOKENS_OUT) else rows
        for (a, b), value in products._product.items():
            flops += (1 if a == b else 2) * count * value.shape[0] * value.shape[1]
    return flops, any(products.precise for products in totals.products.values())


def matmul_rate(dtype, device="cpu", size=2048, seconds=4.0):
    """Floating-point operations a second of large matrix products that follow one another for a while, as in a pass."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    a @ b
    synchronise(device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        synchronise(device)
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - start)


def stage(student_units, teacher_units, tokens):
    """Statistics and assignment of one pair of spaces, ours and the straightforward way."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(tokens, 256, generator=generator)
    teacher = shared @ torch.randn(256, teacher_units, generator=generator) / 16
    student = shared @ torch.randn(256, student_units, generator=generator) / 16
    teacher += torch.randn(teacher.shape, generator=generator)
    student += torch.randn(student.shape, generator=generator) + 1
    start = time.perf_counter()
    products = Products({"t": teacher_units, "s": student_units}, [("s", "t")])
    for begin in range(0, tokens, 4096):
        products.update({"t": teacher[begin : begin + 4096].clone(), "s": student[begin : begin + 4096].clone()})
    found, _ = assign_by_correlation(products.statistics("t", "s", ()))
    ours = time.perf_counter() - start
    x, y = teacher.numpy(), student.numpy()
    start = time.perf_counter()
    correlation, how = by_unit(x, y)
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    plain = time.perf_counter() - start
    expected = np.full(student_units, -1)
    expected[rows] = columns
    return {
        "student_units": student_units, "teacher_units": teacher_units, "tokens": tokens, "ours": ours, "plain": plain,
        "plain_way": how, "speedup": plain / ours, "same_indices": bool((found.indices.numpy() == expected).all()),
    }  # fmt: skip


def assigned(units, related):
    """Seconds of the solvers for correlations with a noisy copy in another order, or with another model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tokens = 2 * units
    if related:
        teacher = normal(tokens, units)
        student = teacher[:, torch.randperm(units, generator=generator)] + normal(tokens, units)
    else:
        shared = normal(tokens, 256)
        teacher, student = (shared @ normal(256, units) / 16 + normal(tokens, units) for _ in range(2))
    teacher, student = ((x - x.mean(0)) / x.std(0) for x in (teacher, student))
    correlation = (student.T @ teacher / tokens).double().numpy()
    solvers = {"scipy": lambda: linear_sum_assignment(correlation, maximize=True)[1]}
    if importlib.util.find_spec("lap"):
        import lap

        solvers["lapx"] = lambda: lap.lapjv(-correlation, return_cost=False)[0]
    seconds, sums = {}, {}
    for name, solve in solvers.items():
        start = time.perf_counter()
        columns = solve()
        seconds[name] = time.perf_counter() - start
        sums[name] = float(correlation[np.arange(units), columns].sum())
    return {"units": units, "related": related, "seconds": seconds, "sums": sums}


def by_unit(x, y):
    """Pearson correlation of every student unit with all teacher units, one unit after another."""
    try:
        from sklearn.feature_selection import r_regression
    except ImportError:
        return np.stack([np.corrcoef(x, y[:, i], rowvar=False)[-1, :-1] for i in range(y.shape[1])]), "numpy.corrcoef"
    return np.stack([r_regression(x, y[:, i]) for i in range(y.shape[1])]), "sklearn r_regression"


def command(arguments):
    """Wall and process time of one command, its start included; of the imports alone when None."""
    imports = ["-c", "import peft_graft; peft_graft.transfer"]
    run = imports if arguments is None else ["-m", "peft_graft", *map(str, arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, *run], check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(getattr(after, part) - getattr(before, part) for part in ("ru_utime", "ru_stime"))
    return {"wall": wall, "process_time": used}


def peak_mib():
    """Peak memory of this process; ru_maxrss would tell that of its parent too, where that was larger."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def synchronise(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def processor():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[50_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shown = list(sys.argv[1:])
    for option in ("--models", "--text", "--out"):  # what is recorded of the command names no folder of the machine
        if option in args.shown:
            args.shown[args.shown.index(option) + 1] = option.removeprefix("--").upper()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    bench = Bench(args)
    if args.child:
        print(json.dumps(getattr(bench, args.child[0])(*args.child[1:])))
        return
    for part in args.parts:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
