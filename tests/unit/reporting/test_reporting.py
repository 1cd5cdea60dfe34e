"""What a run tells its user: every number of a made-up night must be found where it belongs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import random
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from sleeprl.cluster.waits import Waits, Watchdog
from sleeprl.config.methods import METHODS
from sleeprl.evaluation.statistics import wilson_interval
from sleeprl.reporting import charts
from sleeprl.reporting.charts import Series
from sleeprl.reporting.metrics_log import MetricsLog, read_metrics
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.report import collect_curves, collect_distributions, write_report
from sleeprl.reporting.summary_table import BeforeAfterTable, night_result
from sleeprl.reporting.summary_view import (
    RATES,
    format_duration,
    format_headline,
    format_number,
    read_figure,
)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- a made-up night ---------------------------------------------------------------


def block(recall: float, two_hop: float, retention: float | None, ppl: float) -> dict[str, Any]:
    counts = {"recall": 180, "two_hop": 60, "retention": 400, "perplexity": 9000}
    figures = {"recall": recall, "two_hop": two_hop, "retention": retention, "perplexity": ppl}
    return {**figures, "n": counts}


def night() -> dict[str, Any]:
    return {
        "name": "first-night",
        "model": "embedded",
        "seed": 0,
        "slept_on": "20 new people",
        "before": block(6 / 180, 1 / 60, 391 / 400, 3.412),
        "before_with_context": block(178 / 180, 51 / 60, None, 3.412),
        "fine_tuned": block(169 / 180, 25 / 60, 307 / 400, 5.87),
        "after": block(164 / 180, 31 / 60, 388 / 400, 3.466),
        "seconds": {
            "wake": 1.2,
            "self_study": 31.4,
            "consolidation": 74.9,
            "dreaming": 96.0,
            "fine_tuning": 41.5,
            "morning": 28.3,
        },
        "gate": {
            "passed": True,
            "retention_before": 391 / 400,
            "retention_after": 388 / 400,
            "tolerance": 0.02,
        },
        "generation": "g0001",
        "idle": {
            "engine-0": {"gate": 14.2, "sync": 3.1},
            "learner": {"data": 38.4, "sync": 2.2, "score": 6.0},
            "scorer-0": {"data": 61.7},
        },
        "samples": [
            {
                "title": "A dream that taught",
                "prompt": "Write a question about something you know, then its answer.",
                "text": "Question: Where does <Mira Voss> live?\nAnswer: Mira Voss lives in Tarn.",
                "note": "reward 0.81, advantage +1.3, weights of version 4",
            },
            {"text": "Write one fact that you know. Orin Hale keeps a heron."},
        ],
        "environment": {"python": "3.11", "packages": {"torch": "2.9", "vllm": "0.20"}},
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with noisy curves, a value that was not finite, and a resumed step."""
    chance, folder = random.Random(0), tmp_path / "first-night"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\nmodel: embedded\nnight:\n  nights: 1\n")
    (folder / "summary.json").write_text(json.dumps(night()))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(240):
            done = step / 240
            metrics = {
                "loss": 2.2 * math.exp(-5 * done) + 0.08 + 0.1 * chance.random(),
                "divergence": 0.9 * math.exp(-6 * done) + 0.02 + 0.03 * chance.random(),
                "imitation_reward": 0.85 - 0.7 * math.exp(-3 * done) + 0.06 * chance.gauss(0, 1),
                "learning_rate": 3e-3 * min(1, (step + 1) / 20) * (1 - done),
                "grad_norm": math.nan if step == 97 else 1.0 + chance.random(),
                "tokens_per_second": 5200 + 300 * chance.gauss(0, 1),
                "world_size": 2,
            }
            if step % 24 == 0:
                metrics["retention_probe"] = 0.978 - 0.01 * done + 0.003 * chance.random()
            log.write("consolidation", step, **metrics)
        for step in range(40):
            log.write(
                "dreaming",
                step,
                dream_reward=0.2 + 0.5 * step / 40 + 0.1 * chance.random(),
                policy_loss=0.3 * chance.gauss(0, 1),
                kl_to_reference=0.001 * step,
                staleness=chance.choice([0, 0, 1]),
            )
    return folder


class Page(HTMLParser):
    """The visible text of a page, and everything in it that would load something."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag in ("script", "link"):
            self.loads.append(tag)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words.append(data)


def page_of(run: Path) -> Page:
    html = write_report(run).read_text()
    page = Page(html)
    assert page.stack == [], "unclosed elements"
    assert page.loads == [], "the page must not load anything"
    assert "nan" not in html.lower(), "a coordinate that is no number"
    return page


# --- metrics -----------------------------------------------------------------------


def test_metrics_are_whole_lines_with_time_phase_and_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path, clock=lambda: 12.5)
    log.write("wake", 3, loss=0.25, ages=[0, 1])
    assert path.read_text().endswith("}\n"), "a line is on disk as soon as it is written"
    assert read_metrics(path) == [
        {"time": 12.5, "phase": "wake", "step": 3, "loss": 0.25, "ages": [0, 1]}
    ]


def test_not_finite_values_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.write("p", 0, loss=math.nan, parts={"kl": -math.inf, "ce": 1.0}, ages=[math.inf, 2.0])
    (row,) = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    assert row["loss"] is None
    assert row["parts"] == {"kl": None, "ce": 1.0}
    assert row["not_finite"] == ["loss", "parts.kl", "ages[0]"]


def test_a_metric_cannot_take_a_name_of_the_log(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="not_finite"):
        log.write("p", 0, not_finite=1)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_log_torn_anywhere_is_read_and_resumed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path, clock=lambda: 1.0) as log:
        log.write("wake", 0, loss=1.0)
        log.write("schläft", 1, loss=2.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    before = [row["step"] for row in read_metrics(path)]
    with MetricsLog(path) as log:
        log.write("wake", 2, loss=3.0)
    after = [row["step"] for row in read_metrics(path)]
    assert after == [*before, 2]
    assert before == ([0, 1] if cut == 1 else [0]), "only the torn line is lost"
    assert [json.loads(line)["step"] for line in path.open()] == after


def test_a_broken_line_in_the_middle_is_left_out_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"phase": "a", "step": 0}\n{"phase": "a", "st\n{"phase": "a", "step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [0, 2]
    assert "line 2" in caplog.text
    assert read_metrics(tmp_path / "absent.jsonl") == []


# --- waits -------------------------------------------------------------------------


def test_idle_seconds_are_attributed_to_waiter_and_kind() -> None:
    clock = Clock()
    waits = Waits("learner", clock=clock)
    with waits.on("engine-0", what="batch 1", kind="data"):
        clock.now += 5
    clock.now += 100  # busy
    with waits.on("engine-0", what="version 2", kind="sync"):
        clock.now += 2
    with waits.on("learner", what="step 1", kind="train", waiter="engine-0"):
        clock.now += 3
        assert waits.idle()["engine-0"] == {"train": 3}, "open waits count"
    assert waits.idle() == {"learner": {"data": 5, "sync": 2}, "engine-0": {"train": 3}}


def test_a_lap_begins_anew_in_the_middle_of_a_wait() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    with waits.on("engine", what="a start", kind="start"):
        clock.now += 5
        assert waits.take_idle() == {"driver": {"start": 5}}
        clock.now += 2
    assert waits.take_idle() == {"driver": {"start": 2}} and waits.take_idle() == {}
    with waits.on("another", what="a start", kind="start", waiter="train"):
        clock.now += 1
        assert waits.total("start") == 8, "of all waiters, through every lap"


def test_a_loop_that_looks_says_who_waits_and_who_no_longer() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    waits.set_target("learner", "engine", what="4 groups", kind="data")
    clock.now += 3
    waits.set_target("learner", "engine", what="3 groups", kind="data")
    (wait,) = waits.current()
    assert wait.describe(clock()) == "learner has waited 3 s for data from engine: 4 groups"
    clock.now += 2
    waits.set_target("learner", "scorer", what="3 groups", kind="data")  # another wait, since now
    assert [w.since for w in waits.current()] == [clock()]
    clock.now += 1
    waits.set_target("learner", None)
    clock.now += 7
    waits.set_target("learner", None)
    assert waits.current() == [] and waits.idle() == {"learner": {"data": 6}}


def test_overlapping_waits_never_add_up_to_more_than_the_time() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    with waits.on("engine-0", what="a", kind="generate"):
        clock.now += 1
        with waits.on("scorer", what="b", kind="score"):
            clock.now += 2
    assert waits.idle() == {"driver": {"generate": 3}}

    first = waits.on("engine-0", what="a", kind="data")
    second = waits.on("scorer", what="b", kind="score")
    first.__enter__()
    second.__enter__()
    clock.now += 4
    first.__exit__(None, None, None)
    clock.now += 8
    second.__exit__(None, None, None)
    assert waits.idle() == {"driver": {"generate": 3, "data": 4, "score": 8}}


def test_waits_in_async_code_end_with_an_error_too() -> None:
    clock = Clock()
    waits = Waits(clock=clock)

    async def one(whom: str) -> None:
        with waits.on(whom, what="reply", kind="generate"):
            await asyncio.sleep(0)
            clock.now += 1
            raise RuntimeError(whom)

    async def both() -> list[BaseException | None]:
        return [*await asyncio.gather(one("engine-0"), one("engine-1"), return_exceptions=True)]

    assert [str(e) for e in asyncio.run(both())] == ["engine-0", "engine-1"]
    assert waits.current() == []
    assert waits.idle() == {"driver": {"generate": 2}}


def test_current_names_who_waits_for_whom_oldest_first() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    with waits.on("engine-0", what="batch 7", kind="data", waiter="learner"):
        clock.now += 2
        with waits.on("learner", what="room", kind="gate", waiter="engine-0"):
            told = [(w.waiter, w.target, w.what, w.kind, w.since) for w in waits.current()]
    assert told == [
        ("learner", "engine-0", "batch 7", "data", 100.0),
        ("engine-0", "learner", "room", "gate", 102.0),
    ]


def test_an_unknown_kind_of_wait_is_refused() -> None:
    wait = Waits().on("x", what="y", kind="coffee")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'coffee'.*generate"):
        wait.__enter__()


def test_the_watchdog_reports_once_and_again_when_the_wait_has_doubled() -> None:
    clock = Clock()
    heard: list[str] = []
    waits = Waits("learner", clock=clock)
    dog = Watchdog(waits, limit_s=60, on_stall=heard.append)
    wrote = lambda: ["loading", "still loading"]  # noqa: E731
    with waits.on("engine-0", what="batch 12", kind="data", log_tail=wrote):
        assert dog.check(clock.now + 59) == []
        assert dog.check(clock.now + 62) == [
            "learner has waited 62 s for data from engine-0: batch 12\n  loading\n  still loading"
        ]
        assert dog.check(clock.now + 123) == []
        assert dog.check(clock.now + 124) != []
    assert dog.check(clock.now + 1000) == [], "a wait that is over is no stall"
    assert len(heard) == 2


def test_the_watchdog_follows_the_chain_and_sees_it_close() -> None:
    clock = Clock()
    waits = Waits(clock=clock)
    dog = Watchdog(waits, limit_s=10, on_stall=lambda message: None)
    first, last = lambda: ["of the first"], lambda: ["of the last"]
    with waits.on("engine-0", what="batch 1", kind="data", waiter="learner", log_tail=first):
        clock.now += 5
        with waits.on("learner", what="version 3", kind="sync", waiter="engine-0", log_tail=last):
            (message,) = dog.check(clock.now + 6)
    message, _, wrote = message.partition("\n")
    assert wrote == "  of the last"
    assert message == (
        "learner has waited 11 s for data from engine-0: batch 1; "
        "engine-0 has waited 6 s for a weight update with learner: version 3; "
        "they wait for each other"
    )


def test_the_watchdog_thread_survives_a_failing_callback(caplog: pytest.LogCaptureFixture) -> None:
    clock, called = Clock(), threading.Event()
    calls: list[str] = []

    def callback(message: str) -> None:
        calls.append(message)
        clock.now *= 10  # past the doubling
        if len(calls) > 1:
            called.set()
        raise RuntimeError("no terminal")

    waits = Waits(clock=clock)
    with (
        waits.on("engine-0", what="x", kind="data"),
        Watchdog(waits, limit_s=1, on_stall=callback, every_s=0.001),
    ):
        clock.now += 10
        assert called.wait(10), "a second report after the first callback failed"
    assert "no terminal" in caplog.text


# --- progress ----------------------------------------------------------------------

PHASES = [("wake", "Wake"), ("grow", "Consolidation"), ("dream", "Dreaming")]


def plain(clock: Clock, every_s: float = 10.0) -> tuple[io.StringIO, NightProgress]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=60)
    return out, NightProgress(PHASES, console, every_s=every_s, clock=clock)


def test_without_a_terminal_progress_is_plain_lines() -> None:
    clock = Clock()
    out, progress = plain(clock)
    with progress:
        progress.skip("wake", "its result is there")
        progress.start("grow", total=100, note="2 workers")
        for step in range(1, 31):
            clock.now += 1
            progress.update("grow", completed=2 * step, loss=0.125, stage="[seed]")
        clock.now += 5
        progress.finish("grow", note="kept")
        progress.start("dream")
        clock.now += 61
        progress.fail("dream", ValueError("no engine\nlong trace"))
    assert out.getvalue().splitlines() == [
        "[0:00] Wake: skipped, its result is there",
        "[0:00] Consolidation: started, 2 workers",
        "[0:10] Consolidation: 20/100, 0:10, 0:40 left  loss 0.125  stage [seed]",
        "[0:20] Consolidation: 40/100, 0:20, 0:30 left  loss 0.125  stage [seed]",
        "[0:30] Consolidation: 60/100, 0:30, 0:20 left  loss 0.125  stage [seed]",
        "[0:35] Consolidation: done in 0:35  loss 0.125  stage [seed]  kept",
        "[0:35] Dreaming: started",
        "[1:36] Dreaming: FAILED after 1:01  ValueError: no engine",
    ]


def test_what_is_left_is_told_without_the_start() -> None:
    clock = Clock()
    out, progress = plain(clock)
    with progress:
        progress.start("grow", total=10)
        clock.now += 100  # until workers are up
        for step in (1, 2, 3):
            progress.update("grow", completed=step)
            clock.now += 10
        progress.finish("grow")
    assert out.getvalue().splitlines()[1:-1] == [
        "[1:40] Consolidation: 1/10, 1:40",
        "[1:50] Consolidation: 2/10, 1:50, 1:20 left",
        "[2:00] Consolidation: 3/10, 2:00, 1:10 left",
    ]


def test_what_an_earlier_attempt_did_is_done_and_no_measure_of_the_pace() -> None:
    clock = Clock()
    out, progress = plain(clock)
    with progress:
        progress.start("grow", total=40)
        for step in (21, 22, 17, 18):  # resumed, and a worker lost on the way
            clock.now += 10
            progress.update("grow", completed=step)
        progress.finish("grow")
    assert out.getvalue().splitlines()[1:-1] == [
        "[0:10] Consolidation: 21/40, 0:10",
        "[0:20] Consolidation: 22/40, 0:20, 3:00 left",
        "[0:30] Consolidation: 17/40, 0:30",
        "[0:40] Consolidation: 18/40, 0:40, 3:40 left",
    ]


def test_an_exception_fails_the_running_phase_and_goes_on() -> None:
    out, progress = plain(Clock())
    with pytest.raises(KeyboardInterrupt), progress:
        progress.start("grow")
        raise KeyboardInterrupt
    assert "Consolidation: FAILED after 0:00  KeyboardInterrupt" in out.getvalue()


def test_on_a_terminal_prints_and_logs_of_others_appear_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    handler = logging.StreamHandler()  # made before the display, holds the old stderr
    logger = logging.getLogger("test_reporting.progress")
    logger.propagate = False
    logger.addHandler(handler)
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    clock = Clock()
    progress = NightProgress(PHASES, console, clock=clock)
    with progress:
        progress.start("grow", total=10)
        for step in (2, 4):
            clock.now += 2
            progress.update("grow", completed=step, loss=0.5)
        print("printed by someone")
        logger.warning("logged by someone")
        progress.skip("dream", "resumed")
    logger.removeHandler(handler)
    assert handler.stream is sys.__stderr__, "the handler has its stream back"
    lines = out.getvalue().splitlines()
    assert any(line.endswith("printed by someone") for line in lines)
    assert any(line.endswith("logged by someone") for line in lines)
    shown = out.getvalue()
    assert "4/10  0:06 left  loss 0.5" in shown
    assert any("Dreaming" in line and line.endswith("resumed") for line in lines)


def rendered(renderable: RenderableType, width: int = 80) -> list[str]:
    """The lines that a terminal of this width shows; none is wider."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    lines = console.export_text().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    return lines


def words(lines: list[str]) -> str:
    """The same as one line, so that it does not matter where lines were wrapped."""
    return " ".join(" ".join(lines).split())


def test_the_terminal_table_has_the_figures_and_their_intervals() -> None:
    summary = night()
    del summary["fine_tuned"]
    summary["after"]["two_hop"] = None
    lines = rendered(BeforeAfterTable(summary))
    rows = [line.split("  ") for line in lines if " (" in line]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["Before", "3 (2-7)", "2 (0-9)", "98 (96-99)", "3.41"],
        ["Before, text in prompt", "99 (96-100)", "85 (74-92)", "-", "3.41"],
        ["After the night", "91 (86-94)", "-", "97 (95-98)", "3.47"],
    ]
    assert lines[-1].endswith("questions: recall 180, retention 400")


def every_baseline() -> dict[str, Any]:
    """A night with every method beside it, and figures that take as much room as any."""
    summary = night()
    summary["baselines"] = {
        name: {"title": method.title, **block(1, 0.999, 1, 1_234_567.0)}
        for name, method in METHODS.items()
    }
    summary["baselines"]["[red]"] = {"title": "[red] a title in brackets", **block(1, 1, 1, 3.0)}
    return summary


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_is_whole_with_all_baselines(width: int) -> None:
    summary = every_baseline()
    lines = rendered(BeforeAfterTable(summary), width)
    text = words(lines)
    assert "…" not in text and text.count("[red]") == (1 if width >= 80 else 2)
    methods = [name for name in METHODS if name != "fine_tuning"]
    assert text.count("1.2e6") == len(methods)
    if width >= 80:
        (row,) = [line for line in lines if "Fine-tuning, self-study" in line]
        figures = row.split("Fine-tuning, self-study")[1].split("  ")
        assert [each.strip() for each in figures if each.strip()] == [
            "100 (98-100)",
            "100 (94-100)",
            "100 (99-100)",
            "1.2e6",
        ]
    else:
        assert text.count("100 (98-100)") == len(methods) + 1, "each figure once"
    for name in ("Recall %", "Two-hop %", "Retention %", "Perplexity"):
        assert name in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_is_whole_with_metrics_of_others(width: int) -> None:
    summary = every_baseline()
    mine = {f"mine_{n}": f"[red]Metric number {n}" for n in range(5)}
    summary["metrics"] = {**RATES, **mine}
    for state in (summary, summary["baselines"]):
        for block_ in state.values():
            if isinstance(block_, dict) and "n" in block_:
                block_ |= dict.fromkeys(mine, 0.25)
                block_["n"] = {**block_["n"], **dict.fromkeys(mine, 100)}
    text = words(rendered(BeforeAfterTable(summary), width))
    assert "…" not in text and text.count("(18-34)") == 5 * text.count("1.2e6") + 25
    for name in (*RATES.values(), *mine.values()):
        assert f"{name} %" in text


def test_the_end_of_a_night_says_where_everything_is() -> None:
    place = Path("runs") / ("[red]" + "a-long-name-" * 9)
    summary = night() | {"wall_seconds": 200.0}
    summary["seconds"]["starting"] = 30.0
    told = "".join(rendered(night_result(summary, place, Path("generations"))))
    assert f"Report: {place / 'report.html'}" in told
    assert "Time: 3 min 20 s, 30.0 s of it (15 %) starting processes" in told
    assert "Generation: generations/g0001" in told
    summary["generation"] = None
    lost = [{"question": "Who is [bold]Ann[/]?", "before": "A", "after": "B"}] * 7
    summary["gate"] |= {"refused": "retention fell", "forgotten": lost}
    lines = rendered(night_result(summary, place, Path("generations")))
    assert "No generation: retention fell" in lines
    assert lines.count("  lost: Who is [bold]Ann[/]? A → B") == 5
    assert lines[-1] == "All 7 of what was lost: the report"


# --- figures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)$conf.int; 81/263 is in Newcombe (1998), table I.
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (11, 10), (-1, 10)])
def test_what_is_no_proportion_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="proportion"):
        wilson_interval(successes, n)


def test_a_figure_without_its_n_has_no_interval() -> None:
    assert read_figure({"after": {"recall": 0.5}}, "after", "recall").interval is None  # type: ignore[union-attr]
    assert read_figure({"after": {"recall": None}}, "after", "recall") is None
    assert read_figure({}, "after", "recall") is None


def test_headline() -> None:
    summary = night()
    assert format_headline(summary) == (
        "Slept on 20 new people: recall 3 % → 91 %, retention 97.8 % → 97.0 %; gate passed."
    )
    summary["gate"]["tolerance"] = None
    assert format_headline(summary).endswith("; gate passed on the perplexity alone.")
    summary["gate"]["passed"] = False
    del summary["slept_on"], summary["before"]
    assert format_headline(summary) == (
        "One night: recall 91.1 %, retention 97.0 %; gate refused it, rolled back."
    )
    assert format_headline({}) == "This night is not finished."


def test_numbers_are_short_and_durations_have_units() -> None:
    values = [0, 0.12345, 12345.6, 3e-5, -2.5e9, 1.0, 999.7]
    assert [format_number(v) for v in values] == [
        "0",
        "0.123",
        "12,346",
        "3.0e-5",
        "-2.5e9",
        "1",
        "1,000",
    ]
    told = [format_duration(s) for s in (0.416, 12.34, 59.97, 185, 3599.7, 3725)]
    assert told == ["0.42 s", "12.3 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "1 h 02 min"]


# --- charts and report -------------------------------------------------------------


def test_ticks_are_round_and_within() -> None:
    assert charts.round_ticks(0, 1, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert charts.round_ticks(0.751, 0.99, 5) == pytest.approx([0.8, 0.85, 0.9, 0.95])
    assert charts.round_ticks(3, 3, 4) == [3]


def test_thinning_keeps_ends_and_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(5001)]
    thinned = charts.thin_points(points)
    assert len(thinned) <= charts.MAX_POINTS
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert [x for x, _ in thinned] == sorted({x for x, _ in thinned})
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(3.0, abs=0.1)


def test_a_curve_breaks_where_a_value_was_not_finite() -> None:
    svg = charts.draw_curve(Series("loss", [0, 1, 2, 3, 4], [1, 2, None, 4, 3]), large=True)
    assert svg.count('<path class="line"') == 2
    assert "from 1 at step 0 to 3 at step 4, lowest 1, highest 4" in svg


def test_curves_take_the_last_value_of_a_repeated_step() -> None:
    rows = [
        {"phase": "p", "step": 0, "loss": 9.0, "text": "x", "flag": True},
        {"phase": "p", "step": 1, "loss": 8.0},
        {"phase": "p", "step": 1, "loss": None, "not_finite": ["loss"]},
        {"phase": "p", "step": 0, "loss": 1.0, "other": 2.0},
        {"phase": "p", "step": 2, "loss": 3.0},
    ]
    (phase,) = collect_curves(rows)
    (loss,) = phase.large
    assert loss.series == Series("loss", [0, 1, 2], [1.0, None, 3.0])
    assert (loss.last, loss.not_finite) == (3.0, 1)
    assert [c.series.name for c in phase.constant] == ["other"]


def test_the_report_has_every_figure_of_the_night(run_dir: Path) -> None:
    text = page_of(run_dir).text
    assert format_headline(night()) in text
    for cell in (
        "91.1 % 86.0\u201394.5 n = 180",  # recall after
        "51.7 % 39.3\u201363.8 n = 60",  # two-hop after
        "97.0 % 94.8\u201398.3 n = 400",  # retention after
        "3.3 % 1.5\u20137.1 n = 180",  # recall before
        "76.8 % 72.4\u201380.6 n = 400",  # retention fine-tuned
        "3.47 n = 9000",
        "not measured",  # retention with context
        "the gate refuses below 95.8 %",
        "learner 46.6 s data 38.4 s, sync 2.2 s, score 6.0 s",
    ):
        assert cell in text, cell
    for part in ("1 min 36 s", "4 min 33 s", "g0001", "<Mira Voss>", "packages.torch", "nights: 1"):
        assert part in text, part
    assert "1 not finite" in text, "a value that was lost is told"
    assert "world_size 2" in text, "what never changed is a number, not a flat curve"


def test_the_time_in_which_processes_started_is_told_apart(run_dir: Path) -> None:
    assert "starting processes" not in page_of(run_dir).text
    summary = night()
    summary["seconds"]["starting"] = 54.6
    (run_dir / "summary.json").write_text(json.dumps(summary))
    text = page_of(run_dir).text
    assert "4 min 33 s" in text, "it is a part of the phases, and not added to them"
    assert "starting processes 54.6 s, 20 %" in text


def test_important_curves_are_large_and_the_others_folded(run_dir: Path) -> None:
    consolidation, dreaming = collect_curves(read_metrics(run_dir / "metrics.jsonl"))
    names = [c.series.name for c in consolidation.large]
    assert names == ["loss", "divergence", "imitation_reward", "retention_probe"]
    assert [c.series.name for c in dreaming.large] == ["policy_loss", "dream_reward"]
    assert [c.series.name for c in dreaming.small] == ["kl_to_reference", "staleness"]


def test_the_map_has_a_mark_per_state_and_a_line_for_the_one_without_retention(
    run_dir: Path,
) -> None:
    html = write_report(run_dir).read_text()
    for state in ("before", "fine_tuned", "after"):
        assert html.count(f'<g class="{state}"><line class="bar"') == 1
    assert 'class="before_with_context ceiling"' in html


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "config.yaml", "both"])
def test_an_unfinished_run_renders_with_what_is_there(run_dir: Path, missing: str) -> None:
    for name in ("summary.json", "metrics.jsonl", "config.yaml"):
        if missing == name or (missing == "both" and name != "config.yaml"):
            (run_dir / name).unlink()
    text = page_of(run_dir).text
    assert "first-night" in text
    assert ("This night is not finished." in text) == (missing in ("summary.json", "both"))
    assert ("Consolidation" in text and "imitation_reward" in text) == (
        missing not in ("metrics.jsonl", "both")
    )


@pytest.mark.parametrize("key", sorted(night()))
@pytest.mark.parametrize("emptied", [False, True])
def test_each_part_of_the_summary_may_be_absent_or_null(
    run_dir: Path, key: str, emptied: bool
) -> None:
    summary = night()
    summary[key] = None
    if not emptied:
        del summary[key]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert "None" not in page_of(run_dir).text


def test_all_figures_may_be_null(run_dir: Path) -> None:
    summary = night()
    for state in ("before", "before_with_context", "fine_tuned", "after"):
        summary[state] = dict.fromkeys(summary[state])
    summary["seconds"] = dict.fromkeys(summary["seconds"])
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert "no morning figures yet" in page_of(run_dir).text


def test_histograms_of_staleness_age_and_lag(run_dir: Path) -> None:
    assert "How old dreams were" not in page_of(run_dir).text
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        for step, tokens in enumerate(({"0": 30}, {"0": 10, "2": 60}), start=1):
            log.write("dreaming", step, staleness_tokens=tokens, age_seconds=[0.5, 6.0],
                      publish_lag_seconds=0.25)  # fmt: skip
    found = collect_distributions(read_metrics(run_dir / "metrics.jsonl"))
    assert [spread.name.partition(":")[0] for spread in found] == [
        "staleness",
        "age",
        "publish lag",
    ]
    assert [spread.middle for spread in found] == ["mean 1.2", "median 3.2 s", "median 0.25 s"]
    assert "<desc>0: 40.0 %; 2: 60.0 %</desc>" in found[0].svg and found[0].svg.count("<rect") == 3
    assert sum(n for _, n in charts.make_bins([0.5, 6.0, 0.5, 6.0])) == 4 and charts.make_bins(
        [0.0]
    )[0] == (
        "0",
        1,
    )
    assert "How old dreams were" in page_of(run_dir).text


def test_a_step_that_was_done_again_is_in_the_histograms_once(run_dir: Path) -> None:
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        for step, tokens, age in ((1, {"0": 10}, 1.0), (2, {"0": 50}, 9.0), (2, {"-1": 30}, 3.0)):
            log.write("dreaming", step, staleness_tokens=tokens, age_seconds=[age],
                      publish_lag_seconds=age)  # fmt: skip
    staleness, age, lag = collect_distributions(read_metrics(run_dir / "metrics.jsonl"))
    # Its learner had died, and the engines were an update ahead of the one in its place.
    assert "<desc>-1: 75.0 %; 0: 25.0 %</desc>" in staleness.svg
    assert (staleness.middle, age.middle, lag.middle) == (
        "mean -0.75",
        "median 2.0 s",
        "median 2.0 s",
    )


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_report(tmp_path / "nowhere")
