"""Which ingredient of a graft earns its place: agreement with the teacher on held-out text, nothing polished.

    python benchmarks/quality/ablation.py --models MODELS --data DATA --out out/quality [--cells L6-L3:ner ...]

Every row moves the same module, fits the head to the teacher's predictions, and measures agreement (kappa) and
divergence (nats) on held-out text, and the test score without labels. The first row fits the head over an untrained
module that adds nothing: a row below it moves inner weights that do harm. The candidates that are no methods of
peft-graft live here; ``--polish`` also polishes each row for a few steps. One JSON file for each cell in OUT/ablation.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import ot
import torch
import transformers
from cells import PAIRS, TASKS, Data, teacher
from peft_graft.settings import Clock
from scipy.optimize import linear_sum_assignment

from peft_graft.alignment.activations import Capture, pad, tokenize
from peft_graft.alignment.alignment import Alignment, copy_alignment
from peft_graft.alignment.collect import CollectionSettings, check_pairs, collect
from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.alignment.methods import METHODS, Method, assign_by_correlation, map_axis, regress, rotate
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.distill.agreement import measure
from peft_graft.distill.choose import FIT, HELD_OUT, open_classroom
from peft_graft.distill.fit_head import features, fit_head
from peft_graft.distill.fit_layers import fit_modules
from peft_graft.distill.polish import PolishSettings, polish
from peft_graft.distill.targets import batches
from peft_graft.environment import hardware, versions
from peft_graft.files import read_json, write_json
from peft_graft.graft import graft_head, graft_modules
from peft_graft.models.loading import load_model
from peft_graft.models.spaces import Space
from peft_graft.modules.base import average
from peft_graft.modules.lora import LoraModule
from peft_graft.planning.plan import plan_transfer
from peft_graft.projection import project
from peft_graft.study.training import score

# ---- candidates that are no methods of the package -------------------------------------------------------------------


def absolute_assignment(fit, held_out):
    """Assignment on absolute correlation; units matched with a negative one change sign."""
    correlation = fit.merge(held_out).correlation().cpu().numpy()
    rows, columns = linear_sum_assignment(abs(correlation), maximize=True)
    writing = torch.zeros(correlation.shape, dtype=torch.float64)
    writing[rows, columns] = torch.from_numpy(np.sign(correlation[rows, columns]))
    return LinearMap(writing.T.contiguous(), writing, torch.zeros(correlation.shape[1], dtype=torch.float64)), {}


def scaled_assignment(fit, held_out):
    """Assignment whose every pair is scaled by its own regression, x_t ~ c x_s."""
    whole = fit.merge(held_out)
    selection, _ = assign_by_correlation(whole)
    rows = (selection.indices >= 0).nonzero().flatten()
    columns = selection.indices[rows]
    cross = whole.cross[rows, columns]
    reading = torch.zeros(whole.cross.T.shape, dtype=torch.float64)
    writing = torch.zeros(whole.cross.shape, dtype=torch.float64)
    reading[columns, rows] = cross / whole.student_variance_sum[rows].clamp_min(1e-12)
    writing[rows, columns] = cross / whole.teacher_variance_sum[columns].clamp_min(1e-12)
    return LinearMap(reading, writing, whole.teacher_mean - reading @ whole.student_mean), {}


def transport(fit, held_out):
    """Entropic optimal transport between units at cost 1 - correlation; the plan's barycentres are the maps."""
    correlation = fit.merge(held_out).correlation().cpu().numpy()
    d_s, d_t = correlation.shape
    plan = ot.sinkhorn(np.full(d_s, 1 / d_s), np.full(d_t, 1 / d_t), 1 - correlation, reg=0.02, numItermax=2000)
    plan = torch.from_numpy(plan)
    return LinearMap((plan * d_t).T.contiguous(), plan * d_s, torch.zeros(d_t, dtype=torch.float64)), {}


def gromov(fit, held_out):
    """Gromov-Wasserstein on the units' own dissimilarities, 1 - |correlation| within each model; hardened."""
    whole = fit.merge(held_out)

    def inner(moment):
        deviation = moment.diagonal().sqrt().clamp_min(1e-12)
        return (1 - (moment / torch.outer(deviation, deviation)).abs()).numpy()

    plan = ot.gromov.gromov_wasserstein(inner(whole.student_moment), inner(whole.teacher_moment), max_iter=50)
    rows, columns = linear_sum_assignment(plan, maximize=True)
    indices = torch.full((plan.shape[0],), -1, dtype=torch.int64)
    indices[rows] = torch.from_numpy(columns)
    return Selection(indices, plan.shape[1]), {}


def by_heads(heads_t, heads_s):
    """Head-aware assignment: heads by the best sum of their units' matches, then units within heads."""

    def solve(fit, held_out):
        correlation = fit.merge(held_out).correlation().cpu().numpy()
        size_s, size_t = correlation.shape[0] // heads_s, correlation.shape[1] // heads_t
        blocks = correlation.reshape(heads_s, size_s, heads_t, size_t).transpose(0, 2, 1, 3)
        sums, inner = np.zeros((heads_s, heads_t)), {}
        for a, b in product(range(heads_s), range(heads_t)):
            inner[a, b] = linear_sum_assignment(blocks[a, b], maximize=True)
            sums[a, b] = blocks[a, b][inner[a, b]].sum()
        indices = torch.full((correlation.shape[0],), -1, dtype=torch.int64)
        for a, b in zip(*linear_sum_assignment(sums, maximize=True), strict=True):
            rows, columns = inner[a, b]
            indices[a * size_s + torch.from_numpy(rows)] = b * size_t + torch.from_numpy(columns)
        return Selection(indices, correlation.shape[1]), {}

    return solve


def embedding_map(first, second):
    """A weight-only map of the residual stream: ridge between the embeddings of the words both vocabularies have."""
    vocabularies = [
        {_plain(word): index for word, index in model.tokenizer.get_vocab().items()} for model in (first, second)
    ]
    shared = sorted(vocabularies[0].keys() & vocabularies[1].keys())
    tables = [model.base.get_input_embeddings().weight.detach().float() for model in (first, second)]
    rows = [table[[words[word] for word in shared]] for table, words in zip(tables, vocabularies, strict=True)]
    moments = ("cross", "teacher", "student")
    fit = PairedStatistics.of(rows[0][::8], rows[1][::8], moments)
    for part in range(1, 7):
        fit = fit.merge(PairedStatistics.of(rows[0][part::8], rows[1][part::8], moments))
    return regress(fit, PairedStatistics.of(rows[0][7::8], rows[1][7::8], moments))[0]


def _plain(word):
    return word.removeprefix("▁").lower()


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def best_monotone(similarity):
    """Dynamic programme: one teacher layer for each student layer, never going back."""
    students, teachers = similarity.shape
    total, came = np.full((students, teachers), -np.inf), np.zeros((students, teachers), dtype=int)
    total[0] = similarity[0]
    for row, column in product(range(1, students), range(teachers)):
        came[row, column] = int(np.argmax(total[row - 1, : column + 1]))
        total[row, column] = similarity[row, column] + total[row - 1, came[row, column]]
    path = [int(np.argmax(total[-1]))]
    for row in range(students - 1, 0, -1):
        path.insert(0, int(came[row, path[0]]))
    return path


def average_deltas(modules):
    """AVG on the updates B A themselves, re-factored by a truncated SVD."""
    first = modules[0]
    if len(modules) == 1 or not isinstance(first, LoraModule):
        return average(modules)
    u, s, v = torch.linalg.svd(torch.stack([module.delta() for module in modules]).mean(0))
    root = s[: first.width].sqrt()
    return first.with_values({"A": (root[:, None] * v[: first.width]).float(),
                              "B": (u[:, : first.width] * root / first.scaling).float()})  # fmt: skip


# ---- a cell ----------------------------------------------------------------------------------------------------------


class Cell:
    def __init__(self, args, pair, task):
        self.args, self.pair, self.data = args, pair, Data(task, args.data / TASKS[task])
        names = PAIRS[pair]
        module, self.record = teacher(args.out, args.models, names, self.data)
        self.first, self.second = (load_model(str(args.models / name), tokenizer=True) for name in names[:2])
        self.checkpoint = resolve(read_checkpoint(module), self.first.architecture, self.first.base_tensors())
        self.text = self.data.text(0)
        self.room = open_classroom(
            self.checkpoint, self.first, self.second, self.text, lessons=max(FIT, 32 * args.polish), write=None,
            bf16=True, clock=Clock(None),
        )  # fmt: skip
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(args.models / names.student)
        self.test = self.data.task.encode(self.data.test, self.tokenizer)
        self.pairs = {}
        for layers in ("skip", "avg"):
            self.pairs |= self.plan(layers, METHODS["prune-align"]).pairs
        self.rows = []  # those of an earlier run are kept

    def plan(self, layers, method):
        return plan_transfer(
            self.checkpoint, self.first.architecture, self.second.architecture, layers=layers, method=method
        )

    def statistics(self, pairs):
        settings = CollectionSettings(max_tokens=20_000)
        text = iter(self.text[HELD_OUT:])
        found, _ = collect(
            self.first, self.second, text, dict.fromkeys(pairs, ("teacher", "student")), settings, hold_out=True
        )
        check_pairs(found)
        return found

    def alignment(self, statistics, solve):
        solvers = solve if callable(solve) and not isinstance(solve, dict) else None
        maps = {pair: (solvers or solve[pair])(*moments)[0] for pair, moments in statistics.items()}
        return Alignment("candidate", "", "", maps)

    def moved(self, alignment, layers="skip", mean=average, gain=1.0):
        method = Method("candidate", "")
        plan = self.plan(layers, method)
        modules, _ = graft_modules(self.checkpoint, plan, alignment, method)
        if mean is not average:
            for site in plan.sites:
                parts = []
                for source in site.teacher:
                    module = self.checkpoint.modules[source]
                    parts.append(project(module, lambda axis, source=source, module=module, site=site: alignment.map((
                        Space(source.layer, map_axis(method, module, axis)),
                        Space(site.student.layer, map_axis(method, module, axis))))))  # fmt: skip
                values = {name: tensor.values for name, tensor in mean(parts).tensors.items()}
                modules[site.student] = parts[0].with_values(values, site.student)
        if gain != 1.0:
            modules = {site: module.with_values({name: tensor.values * (gain if name == "B" else 1.0)
                                                 for name, tensor in module.tensors.items()})
                       for site, module in modules.items()}  # fmt: skip
        head, _ = graft_head(self.checkpoint, plan, alignment, self.second.architecture)
        return replace(self.checkpoint, modules=modules, head=head)

    def row(self, name, checkpoint, *, fit=True):
        if name in [row["name"] for row in self.rows]:
            return
        begin = time.perf_counter()
        live = self.room.live(checkpoint)
        before = measure(live, self.second, self.room.held_out)
        if fit:
            read, targets = features(live, self.second, self.room.lessons.part(0, FIT), checkpoint.head.reads)
            head, _ = fit_head(checkpoint.head, read, targets)
            checkpoint = replace(checkpoint, head=head)
        live = self.room.live(checkpoint, trainable=True)
        after = measure(live, self.second, self.room.held_out)
        record = {"name": name, "as moved": before.model_dump(), "head fitted": after.model_dump(),
                  "test": score(live.model, self.test, self.tokenizer, self.data.task)}  # fmt: skip
        if self.args.polish:
            curve = polish(live, self.second, self.room.lessons, self.room.held_out,
                           PolishSettings(steps=self.args.polish, evaluations=2))  # fmt: skip
            record["polish"] = [point.model_dump() for point in curve]
            record["polished test"] = score(live.model, self.test, self.tokenizer, self.data.task)
        record["seconds"] = round(time.perf_counter() - begin, 1)
        self.rows.append(record)
        print(
            f"{self.pair} {self.data.name} {name}: {before.agreement:.3f} -> {after.agreement:.3f}, "
            f"{after.divergence:.3f} nats, test {record['test']:.3f}, polished {record.get('polished test')}",
            flush=True,
        )


def run(args, pair, task):
    path = args.out / "ablation" / f"{pair}-{task}.json"
    cell = Cell(args, pair, task)
    if path.exists():
        cell.rows = read_json(path)["rows"]
    statistics = cell.statistics(cell.pairs)
    heads = [model.base.config.num_attention_heads for model in (cell.first, cell.second)]
    assigned = cell.alignment(statistics, assign_by_correlation)
    base = cell.moved(assigned)
    neutral = {site: module.neutral() for site, module in base.modules.items()}
    cell.row("head fitted, nothing moved", replace(base, modules=neutral))
    plan, room = cell.plan("skip", METHODS["functional"]), cell.room
    fitted = fit_modules(base, plan, cell.first, room.adapted, cell.second, room.live, room.samples)
    cell.row("functional", replace(base, modules=fitted))
    if all(t == s for t, s in cell.pairs.values()):
        same = copy_alignment(cell.pairs, "", "")
        cell.row("copy, skip", cell.moved(same))
        cell.row("copy, avg of the factors", cell.moved(same, "avg"))
        cell.row("copy, avg of the updates (SVD)", cell.moved(same, "avg", average_deltas))
        cell.row("copy, skip, twice the scale", cell.moved(same, gain=2.0))
    cell.row("prune-align", base)
    cell.row("prune-align, absolute correlation", cell.moved(cell.alignment(statistics, absolute_assignment)))
    cell.row("prune-align, scaled unit by unit", cell.moved(cell.alignment(statistics, scaled_assignment)))
    aware = by_heads(*heads)
    by_space = {pair: aware if pair[0].name in ("attn.query.out", "attn.value.out") else assign_by_correlation
                for pair in cell.pairs}  # fmt: skip
    cell.row("prune-align, heads first", cell.moved(cell.alignment(statistics, by_space)))
    cell.row("optimal transport (entropic)", cell.moved(cell.alignment(statistics, transport)))
    cell.row("Gromov-Wasserstein", cell.moved(cell.alignment(statistics, gromov)))
    cell.row("Procrustes", cell.moved(cell.alignment(statistics, rotate)))
    ridge = cell.alignment(statistics, regress)
    cell.row("ridge", cell.moved(ridge))
    for gain in (0.5, 0.25):
        cell.row(f"ridge, {gain} of the scale", cell.moved(ridge, gain=gain))
    cell.row("ridge, avg of the updates (SVD)", cell.moved(ridge, "avg", average_deltas))
    stream = embedding_map(cell.first, cell.second)
    mixed = {pair: stream if pair[0].name in ("attn.in", "tokens.out", "first.out") else found
             for pair, found in assigned.maps.items()}  # fmt: skip
    cell.row("stream by shared words (no text), outputs assigned", cell.moved(Alignment("candidate", "", "", mixed)))
    sample = [Sample(*text.texts) for text in cell.text[HELD_OUT : HELD_OUT + 400]]
    first, second = _layer_means(cell.first, sample), _layer_means(cell.second, sample)
    similarity = np.array([[cka(x, y) for y in first] for x in second])
    layers = ",".join(map(str, best_monotone(similarity)))
    cka_pairs = cell.plan(layers, METHODS["prune-align"]).pairs
    cell.row(f"prune-align, layers by CKA ({layers})",
             cell.moved(cell.alignment(cell.statistics(cka_pairs), assign_by_correlation), layers))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"pair": pair, "task": task, "teacher": cell.record["test"], "rows": cell.rows}
    write_json(path, {**found, "versions": versions(), "hardware": hardware("cpu")})


def _layer_means(model, samples):
    """The mean over a sample's tokens of every layer's input, [samples, d] a layer, in the order of the samples."""
    wanted = [Space(layer, "attn.in") for layer in range(model.architecture.num_layers)]
    inputs, _ = tokenize(model, samples, 128)
    means = [torch.zeros(len(samples), model.architecture.size(space), dtype=torch.float64) for space in wanted]
    with torch.inference_mode(), Capture(model, wanted) as capture:
        for rows in batches([len(row["input_ids"]) for row in inputs]):
            batch = pad(model, [inputs[row] for row in rows], model.device)
            held, mask = capture.forward(batch), batch["attention_mask"].unsqueeze(-1)
            for mean, space in zip(means, wanted, strict=True):
                mean[rows] = ((held[space] * mask).sum(1) / mask.sum(1)).double()
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", default=["L6-L3:ner", "L6-L3:sick", "E5-L6:ner", "E5-L6:sick"])
    parser.add_argument("--polish", type=int, default=0, help="steps; the same for every row")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for cell in args.cells:
        run(args, *cell.split(":"))


if __name__ == "__main__":
    main()
