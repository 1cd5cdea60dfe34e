"""Whole nights on the embedded model with the real Ray, vLLM, DeepSpeed and Ray Train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from sleeprl.config.loader import load
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import from_batch
from sleeprl.lineage import LineageStore
from sleeprl.memory.slots import Slots
from sleeprl.memory.transfer import Transfer, from_dict
from sleeprl.night.gate import commit_generation
from sleeprl.night.model_stages import ModelStages
from sleeprl.night.run_dir import RunDirectory
from sleeprl.reporting.metric_reference import undocumented_keys
from sleeprl.reporting.progress import NightProgress
from tests.support.nights import SMALL, sleeprl, summary
from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which one small night was run, with two learner workers."""
    place = tmp_path_factory.mktemp("night")
    two = ["resources.learner_workers=2", "resources.cpus=3", "consolidation.judge=teacher"]
    own = [
        "phases=[examples.my_phase.purposes]",
        "evaluation.metrics=[examples.my_metric.continued]",
    ]
    done = sleeprl("night", "name=first", *two, *own, *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return place


def test_the_night_teaches_and_is_measured(place: Path) -> None:
    told = summary(place)
    for state in ("before", "before_with_context", "fine_tuned", "after"):
        for figure in ("recall", "two_hop", "retention", "perplexity", "n"):
            assert told[state][figure] is not None
    assert told["before"]["recall"] < 0.2
    assert told["before_with_context"]["recall"] > 0.8
    assert told["after"]["recall"] > told["before"]["recall"] + 0.2
    assert told["after"]["n"]["recall"] == 4 * 7 * 2
    phases = {"wake", "prepare", "self_study", "consolidation", "dreaming", "after"}
    seconds = told["seconds"]
    assert set(seconds) >= phases
    starting = seconds.pop("starting")
    assert told["wall_seconds"] > sum(seconds.values()) > starting > seconds["prepare"] / 2


def test_a_phase_and_a_metric_of_ones_own_are_in_the_summary(place: Path) -> None:
    told = summary(place)
    assert told["purposes"]["self_study"] == told["self_study"]["new"]
    assert told["purposes"]["replay"] == told["self_study"]["replay"]
    assert list(told["seconds"])[3:6] == ["self_study", "purposes", "before"]
    assert told["metrics"]["continued"] == "Continued"
    documents = json.loads((place / "runs" / "first" / "day.json").read_text())["documents"]
    assert told["after"]["n"]["continued"] == len(documents)
    assert 0 <= told["before"]["continued"] <= 1
    assert "Continued" in (place / "runs" / "first" / "report.html").read_text()


def test_the_run_directory_is_complete(place: Path) -> None:
    run = place / "runs" / "first"
    assert yaml.safe_load((run / "config.yaml").read_text())["resources"]["learner_workers"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["phase"] == "consolidation"]
    assert steps == list(range(1, 41))
    assert sum(row["phase"] == "dreaming" for row in rows) == 2
    seeding = [row for row in rows if row["phase"] == "consolidation"]
    assert seeding[-1]["new/kl"] < seeding[0]["new/ce"]
    unknown = {
        key.split(".")[0 if "purposes" in key else -1]
        for key in undocumented_keys(rows, summary(place))
    }
    assert unknown <= {"purposes", "continued"}, "only what plug-ins of the night add"
    assert {"student/kl", "student/pg", "imitation_reward"} <= {k for row in seeding for k in row}
    synced = [row["canary"] for row in rows if "canary" in row]
    assert synced and max(synced) < 2e-3
    dreamt = [row for row in rows if row["phase"] == "dreaming"]
    apart = [row["logprob_difference_max"].get("0") for row in dreamt]
    assert apart[0] is not None and max(filter(None, apart)) < 2e-3
    for row in dreamt:
        assert row["logprob_difference"].keys() == row["logprob_difference_max"].keys()
        assert {"dream/weight_mean", "dream/outside", "dream/mismatch_kl"} <= row.keys()
    html = (run / "report.html").read_text()
    assert "<svg" in html and "http://" not in html.replace("http://www.w3.org", "")


def test_every_dream_is_scored_and_kept(place: Path) -> None:
    lake = Lake(place / "runs" / "first" / "lake")
    dreams = [t for t in from_batch(lake.read("trajectories")) if t.purpose == "dream"]
    assert len(dreams) == 2 * 2 * 4
    for dream in dreams:
        assert (dream.reward is None) != (dream.unscored is None)
        assert dream.ref_logprobs is not None
        assert dream.gap is not None and (dream.gain is None) == (dream.parsed is None)


def test_the_generation_is_an_ordinary_checkpoint(place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = summary(place)
    assert told["gate"]["passed"], told["gate"]
    store = LineageStore(place / "generations")
    path = store.path(told["generation"])
    assert store.head() == told["generation"]
    assert store.verify(told["generation"]) == []
    assert store.get(told["generation"]).figures["after"] == told["after"]
    slots = Slots.load(path)
    assert slots is not None and slots.used == (0,)
    manifest = store.get(told["generation"])
    assert manifest.clock == {"unit": "nights", "now": 1}
    assert [from_dict(step) for step in manifest.steps] == [Transfer(0, 1, (), (0,), 0, ())]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.config.intermediate_size == slots.total_width
    tokenizer = AutoTokenizer.from_pretrained(path)
    day = json.loads((place / "runs" / "first" / "day.json").read_text())
    probes = [p for p in day["probes"] if p["kind"] == "recall"]
    right = 0
    for probe in probes:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe["question"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == probe["answer"]
    # transformers on the committed directory agrees with what vLLM was measured to know.
    assert right / len(probes) == pytest.approx(told["after"]["recall"], abs=0.05)


def test_a_refused_gate_commits_nothing(place: Path) -> None:
    """The morning of the same night again, with a gate that no forgetting passes."""
    told = summary(place)
    shutil.copytree(place / "runs" / "first", place / "runs" / "refused")
    words = [f"runs={place / 'runs'}", "name=refused", f"generations={place / 'none'}"]
    config = load(None, words)
    run = RunDirectory(config, NightProgress([("commit", "Gate")]))
    run.state["results"]["after"]["after"]["retention"] = told["before"]["retention"] - 0.03
    answers = [json.loads(line) for line in (run.dir / "answers/after.jsonl").open()]
    old = next(row for row in answers if row["kind"] == "retention" and row["right"])
    old |= {"answer": "cheese", "right": False}
    (run.dir / "answers/after.jsonl").write_text("\n".join(map(json.dumps, answers)))
    verdict = commit_generation(run, ModelStages(run, "float32"))
    run.close()
    assert verdict["generation"] is None and "rolled back" in verdict["verdict"]
    lost = {row["question"]: row["after"] for row in verdict["gate"]["forgotten"]}
    assert lost[old["question"]] == "cheese"
    assert len(verdict["gate"]["forgotten"]) == len(told["gate"]["forgotten"]) + 1
    assert not (place / "none").exists() or LineageStore(place / "none").list() == []


def test_a_second_call_tells_what_to_do(place: Path) -> None:
    again = sleeprl("night", "name=first", *SMALL, cwd=place)
    assert again.returncode == 2
    assert "name='first'" in again.stderr and "Traceback" not in again.stderr
    tree = sleeprl("lineage", cwd=place)
    assert summary(place)["generation"][:8] in tree.stdout and "HEAD" in tree.stdout


def test_plugins_by_dotted_path_run_with_real_actors(place: Path) -> None:
    """The two examples, in a night that goes on from the first one's consolidation."""
    source, target = place / "runs" / "first", place / "runs" / "plugged"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("summary.json", "dreaming*"))
    state = json.loads((target / "state.json").read_text())
    for phase in ("dreaming", "after", "fine_tuning", "commit"):
        state["results"].pop(phase, None)
    (target / "state.json").write_text(json.dumps(state))
    config = yaml.safe_load((target / "config.yaml").read_text())
    config["name"] = "plugged"
    config["baselines"] = []
    for name in ("brief_reward", "hardest_first"):
        example = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
        config["dreaming"].update(example["dreaming"])
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    for file in Lake(target / "lake").files("trajectories"):
        if "dream" in pq.read_table(file).column("purpose").to_pylist():
            file.unlink()
    done = sleeprl("night", "--resume", str(target), cwd=place)
    assert done.returncode == 0, done.stderr[-4000:]
    dreams = [
        t for t in from_batch(Lake(target / "lake").read("trajectories")) if t.purpose == "dream"
    ]
    assert len(dreams) == 16
    paid = [dream for dream in dreams if dream.reward]
    assert paid
    for dream in paid:
        gain = dream.gain
        assert dream.reward == pytest.approx(10 * gain - 0.02 * len(dream.response_ids), abs=1e-4)
    state = json.loads((target / "dreaming-state" / "position.json").read_text())["curriculum"]
    assert set(state) == {"gaps"}  # of the example and no other curriculum
    assert set(state["gaps"]) == {"document-0", "document-1"}
    assert all(0 < gap < 100 for gap in state["gaps"].values())  # heard of, both
