"""The default polish at its real length."""

from __future__ import annotations

import tiny
from peft_graft.config import POLISH_STEPS, GraftConfig


def test_the_default_polish_at_its_real_length(tmp_path) -> None:
    assert GraftConfig().polish_steps == POLISH_STEPS
    for name, seed in (("teacher", 0), ("student", 5)):
        tiny.base_model(tmp_path / name, layers=1, hidden=16, heads=2, ffn=16, seed=seed)
    tiny.peft_lora(tmp_path / "module", tmp_path / "teacher", targets=["value"])
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(line.split()[:4]) for line in tiny.sentences(120)))
    graft = tiny.transfer(
        tmp_path / "module", student=tmp_path / "student", text=text, polish=POLISH_STEPS, max_tokens=300
    )
    record = graft.report.polish
    assert record is not None
    # Three trials of a twentieth each, the best of which goes on.
    assert record.settings.steps == POLISH_STEPS * 18 // 20
    assert len(record.pilots) == 3
    assert [point.step for point in record.curve if point.step] == [50, 150, 300, 450, 600, 750, 900]
    verdict = graft.report.verdict
    assert verdict.measured.divergence < 0.8 * verdict.moved.divergence
