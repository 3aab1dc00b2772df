"""Reports of grafts made up for their pages: of a tagger and of a language model, with any strings in them."""

from __future__ import annotations

from typing import Any

from peft_graft.report import GraftReport

LABELS = ("O", "B-PER", "B-LOC")


def model(name: str, layers: int) -> dict[str, Any]:
    return {
        "name": f"/models/{name}", "model_type": "bert", "num_layers": layers, "hidden_size": 32,
        "inferred_architecture": False, "fingerprint": f"print-of-{name}",
    }  # fmt: skip


def bare(**more: Any) -> GraftReport:
    """A report of a graft that was moved without any text."""
    sites = [
        {
            "site": f"layer {layer} {role}",
            "teacher_sites": [f"layer {2 * layer} {role}"],
            "norm_kept": 0.9,
            "share": 0.25,
            "maps": [],
        }
        for layer in range(2)
        for role in ("attn.query", "attn.value")
    ]
    return GraftReport.model_validate(
        {
            "module": "/modules/tags", "module_files": {"adapter_config.json": "hash-of-config"},
            "module_library": "peft", "module_kind": "lora", "settings": {},
            "teacher": model("old-base", 4), "student": model("new-base", 2),
            "method": "copy", "method_reason": "asked for", "text": None, "alignment": None, "layers": [[0], [2]],
            "sites": sites, "head": None, "pairing": None,
            "verdict": {"level": "not measured", "text": "give --text to compare the graft with its teacher"},
            "notes": [], "seconds": {"loading models": 1.5}, "versions": {"peft-graft": "0.1.0"},
            "hardware": {"cpus": 2, "device": "cpu"}, **more,
        }
    )  # fmt: skip


def _measured(agreement: float, divergence: float) -> dict[str, Any]:
    return {
        "agreement": agreement, "divergence": divergence, "answers": 120,
        "agreement_interval": [agreement - 0.05, 0.99],
    }  # fmt: skip


def _polish() -> dict[str, Any]:
    def curve(*steps: int) -> list[dict[str, float]]:
        return [{"step": step, "agreement": 0.5 + step / 100, "divergence": 1 - step / 100} for step in steps]

    return {
        "settings": {"steps": 36}, "start": "gradient", "samples": 320, "curve": curve(0, 2, 18, 36),
        "pilots": {"moved 0.003": curve(2)[0], "gradient 0.003": curve(2)[0]},
        "trials": {"moved 0.003": curve(0, 2), "gradient 0.003": curve(0, 2)},
    }  # fmt: skip


def tagger(says: str = "", **more: Any) -> GraftReport:
    """A tagger's report.

    Args:
        says: stands in its names, labels, words and notes.
    """
    labels = [f"{label}{says}" for label in LABELS]
    words = ["Maria", "moved", "to", f"Lisbon{says}"]
    decisions = [
        {"word": word, "teacher": labels[t], "graft": labels[g], "bare": labels[0]}
        for word, t, g in zip(words, (1, 0, 0, 2), (1, 0, 0, 0), strict=True)
    ]
    text = {"texts": [" ".join(words)], "divergence": 0.4}
    maps = [{"space": "layer 0 attn.in", "teacher_space": "layer 0 attn.in", "diagnostics": {"mean_correlation": 0.4}}]
    report = bare(
        text=f"/data/text{says}.txt",
        head={
            "task": "token-classification", "reads": "tokens.out", "labels": labels, "dropped_inner_units": 0,
            "diagnostics": {}, "how": "fitted",
        },
        pairing={
            "samples": 320, "pairs": 3000, "one_to_one": 2500, "teacher_tokens": 4000, "student_tokens": 4100,
            "teacher_share_paired": 0.97, "student_share_paired": 0.96, "nonfinite_pairs": 0,
        },
        verdict={
            "level": "strong", "text": "expected to keep most of the teacher's skill as it is",
            "measured": _measured(0.87, 0.1), "moved": _measured(0.3, 0.9),
        },
        classes={"labels": labels, "counts": [(0, 0, 80), (1, 1, 20), (2, 2, 15), (2, 0, 5)]},
        decisions=[{**text, "decisions": decisions, "first": first} for first in (True, False)],
        tried={f"ridge{says}": _measured(0.6, 0.3)},
        polish=_polish(),
        cost={
            "teacher": {"parameters": 22_600_000, "module_parameters": 73_728, "seconds": 0.2},
            "student": {"parameters": 17_300_000, "module_parameters": 36_864, "seconds": 0.1},
            "texts": 16,
        },
        files={"adapter_model.safetensors": {"size": 160_108, "sha256": "hash-of-weights"}},
        notes=[f"a note{says}"],
        verification={"library": "peft", "version": "0.17", "tensors_loaded": 8, "output_change": 0.5},
        **more,
    )  # fmt: skip
    sites = [site.model_copy(update={"maps": [type(site).model_validate(
        {**site.model_dump(), "maps": maps}).maps[0]]}) for site in report.sites]  # fmt: skip
    return report.model_copy(update={"sites": sites})


def speaker(says: str = "", **more: Any) -> GraftReport:
    """A language model's report; ``says`` stands in prompts and answers."""
    answers = [
        {
            "prompt": f"play some merengue{says}",
            "teacher": f'{{"intent": "PlayMusic", "genre": "merengue"}}{says}',
            "graft": f'{{"intent": "PlayMusic", "artist": "merengue"}}{says}',
            "bare": f"merengue merengue{says}",
        }
    ]
    return bare(
        text="/data/prompts.jsonl",
        verdict={
            "level": "useful", "text": "expected to be well above a fresh one", "measured": _measured(0.9, 0.2),
            "generated": {
                "agreement": 0.7, "exact": 0.28, "token_f1": 0.8, "bare_exact": 0.0, "bare_token_f1": 0.2,
                "answers": 50,
            },
        },
        prompts={
            "prompts": 400, "held_out": 100, "judging": 50, "too_long": 1, "duplicates": 0, "cut": 0, "empty": 0,
            "given": 0, "answer_tokens": 9000, "shared_tokens": 4000, "strict_share": 0.8, "strict_digits": None,
            "module_effect": 2.5,
        },
        kinds=[{"kind": f"in JSON{says}", "prompts": 30, "exact": 0.4, "token_f1": 0.9, "bare_token_f1": 0.1}],
        answers=answers,
        polish=_polish(),
        **more,
    )  # fmt: skip
