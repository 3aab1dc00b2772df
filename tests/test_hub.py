"""Grafts, alignments and modules on the hub: pushed, and read back by name and revision."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from hub import FakeHub

_SCRIPT = """
import contextlib, io, json, shutil, sys, time
from pathlib import Path
import peft_graft
from huggingface_hub import EvalResult
from peft_graft import Alignment, Graft, GraftConfig

world, place = map(Path, sys.argv[1:])
graft = peft_graft.transfer(world / "lora", world / "shallow", config=GraftConfig(method="copy"))
result = EvalResult("token-classification", "org/data", "Data", "f1", 0.75)
graft.push_to_hub("me/graft", results=[result])
graft.push_to_hub("me/graft", revision="second")
again = Graft.from_pretrained("me/graft")
second = Graft.from_pretrained("me/graft", revision="second")
same = all(
    all((tensor.values == found.checkpoint.modules[site].tensors[name].values).all()
        for name, tensor in module.tensors.items())
    for found in (again, second) for site, module in graft.checkpoint.modules.items()
)
# A local student that is a copy of one on the hub is named as that one, for others to find it.
named = world.parent / "named"
shutil.copytree(world / "shallow", named)
config = json.loads((named / "config.json").read_text())
(named / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/base"}))
peft_graft.transfer(world / "lora", named, config=GraftConfig(method="copy")).push_to_hub("me/named")
shutil.rmtree(named)
# A graft is an ordinary module: it moves on, from the hub, to yet another model.
onward = peft_graft.transfer("me/graft", world / "teacher", config=GraftConfig(method="copy", revision="second"))
try:
    Graft.from_pretrained("me/nothing")
    missing = None
except peft_graft.GraftError as error:
    missing = str(error)
# The command uploads what it has written, and asks before any work whether it may.
from peft_graft.cli.main import main

said = {}
for to, *more in (["ours/tagger", "--private"], ["theirs/tagger"], ["tagger"], ["me/tagger", "--token", "reader"]):
    sys.argv = ["peft-graft", "transfer", str(world / "lora"), "--student", str(world / "shallow"), "--method", "copy",
                "-o", str(place / to.replace("/", "-")), "--json", "--push-to", to, *more]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main()
        except SystemExit as end:
            code = end.code
    answer = json.loads(shown.getvalue())
    said[to] = [code, answer["error"]["message"] if "error" in answer else answer["pushed"]]
# One that does not answer any more is asked once, and what it gave before is used.
from huggingface_hub import constants

constants.ENDPOINT, begun = "http://127.0.0.1:9", time.perf_counter()
kept = Graft.from_pretrained("me/graft").labels == again.labels
lost = peft_graft.inspect(world / "lora", "org/nothing", teacher="org/nowhere")
gone = [kept, lost.teacher_problem, lost.student.problem, time.perf_counter() - begun]
print(json.dumps({"gone": gone, "said": said, "same": bool(same), "labels": again.labels, "report": again.report.module,
                  "onward": len(onward.checkpoint.modules), "missing": missing}))
"""


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.close()


def test_a_graft_goes_to_the_hub_and_comes_back(world, tmp_path, hub) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(world), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
             "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["same"]
    assert found["report"].endswith("lora")
    assert found["onward"] == 8
    assert "me/nothing" in found["missing"]
    kept, teacher, student, seconds = found["gone"]
    assert kept
    assert "org/nowhere: the teacher cannot be loaded: there is no folder of this name, and the hub cannot" in teacher
    assert student == teacher
    assert seconds < 20  # huggingface_hub alone asks for 23 seconds about each of five files
    assert done.stderr.count("http://127.0.0.1:9 cannot be reached") == 1
    files = hub.files["me/graft"]["second"]
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
        "README.md",
        "report.html",
    } <= files.keys()
    measured = ModelCard(hub.files["me/graft"]["main"]["README.md"].decode()).data.eval_results
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in measured] == [("org/data", "f1", 0.75)]
    card = files["README.md"].decode()
    assert "library_name: peft" in card
    assert 'graft = "me/graft"' in card
    assert str(world) not in card
    assert found["said"]["ours/tagger"][0] in (0, None)
    assert found["said"]["ours/tagger"][1].startswith(f"{hub.url}/ours/tagger/")
    assert found["said"]["theirs/tagger"] == [1, "me cannot write there"]
    assert found["said"]["tagger"] == [1, "the repository has no owner"]
    assert found["said"]["me/tagger"] == [1, "the token may read but not write"]
    assert "graft.json" in hub.files["ours/tagger"]["main"]
    assert [path.name for path in tmp_path.iterdir() if "tagger" in path.name] == ["ours-tagger"]
    named = hub.files["me/named"]["main"]
    assert json.loads(named["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert 'base = "org/base"' in named["README.md"].decode()
