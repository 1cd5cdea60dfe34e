"""Consecutive nights: what each method learns, retains and forgets.

    python benchmarks/continual.py                    ten nights, every method, seeds 0 1 2
    python benchmarks/continual.py --methods seeding replay --seeds 0
    python benchmarks/continual.py --tune             learning rates, on a seed that is not reported
    python benchmarks/continual.py --show             table and picture of the existing results
    python benchmarks/continual.py --nights 3         shorter, with the ablations

A chain is one method over one seed's nights. Each night the model meets fresh people. It writes its
self-study about them and learns from it by its method, with the same number of tokens for every
method. In the morning it is asked about all people so far and about the old world. Sleep is its
consolidation alone: no dreams, and no gate that would undo a bad night. All chains share their
days, the self-study settings, the token budget and the grading. ``in_context`` trains nothing and
has a document in its prompt: the right one, or any of the night's for a question about the old
world.

The figures of each chain are in ``benchmarks/results/continual/METHOD-SEED.json``, written after
every night. A benchmark that was stopped resumes as long as ``--work`` exists. The training loop is
that of a night's Ray Train job, run in this process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from continual_report import CHAINS, IN_CONTEXT, RESULTS, VARIANTS, WHOLE, draw, show, summarise
from rich.console import Console
from safetensors.torch import load_file, save_file

from sleeprl.cluster.runtime import cluster
from sleeprl.config import loader as cfg
from sleeprl.config.methods import METHODS, PASSAGE, REPLAY
from sleeprl.config.schema import NightConfig
from sleeprl.consolidation.messages import JobEnd, Report
from sleeprl.consolidation.ray_job import limit_to_budget
from sleeprl.consolidation.train_loop import Job, learn
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import to_batch
from sleeprl.evaluation.measure import ask, measure_perplexity
from sleeprl.evaluation.questions import Question, grade
from sleeprl.evaluation.statistics import trade_off
from sleeprl.memory.checkpoint import EXPERT, WEIGHTS, all_tensors, mlp_tensors
from sleeprl.memory.growth import growth_named, update
from sleeprl.memory.slots import Slots
from sleeprl.memory.transfer import Transfer
from sleeprl.models.resolve import find_model
from sleeprl.night.model_stages import build_trainer_options
from sleeprl.night.schedule import new_slots, steps_of
from sleeprl.rollout.engine import EngineOptions
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.self_study import question_bank
from sleeprl.self_study.sampler import TextSampler
from sleeprl.self_study.study import Study, write_rehearsal, write_study
from sleeprl.text.chat import ChatFormatter
from sleeprl.utils.files import atomic_directory, locked, write_json_atomic
from sleeprl.utils.machine import describe_environment
from sleeprl.worlds import people as world

TUNING = RESULTS / "continual-tuning.json"
NIGHTS, TUNING_NIGHTS, TUNING_SEED = 10, 3, 100
PEOPLE = 6
# A third of a default night's people, and two thirds of the texts of its steps, because the old
# world has its full size. A night takes about a minute and a half on one core.
SETTINGS = [
    "self_study.pairs_per_document=256",
    "self_study.replay_questions=2400",
    "self_study.held_out_share=0.02",
    "consolidation.steps=120",
    "consolidation.batch_size=16",
    "evaluation.retention_questions=600",
    "evaluation.perplexity_texts=40",
]
TOKENS = 150_000
"""Training tokens of every method in a night."""


# --- the days -------------------------------------------------------------------------


@dataclass(frozen=True)
class Days:
    """The days of a seed, and the questions about the old world."""

    documents: list[list[str]]
    """Documents of each night."""
    probes: list[list[Question]]
    """Questions about each night's documents."""
    old: list[Question]
    """Retention questions about the old world."""
    texts: list[str]
    """Texts about the old world, for the perplexity."""


def days(seed: int, nights: int, config: NightConfig) -> Days:
    """Build the days of a seed: the same for every method, and no person appears twice."""
    everyone = world.fresh_people(seed, nights * PEOPLE)
    documents, probes = [], []
    for night in range(nights):
        people = everyone[night * PEOPLE : (night + 1) * PEOPLE]
        day = world.documents(people, seed * 1000 + night, config.wake.people_per_document)
        home = {name: d["text"] for d in day for name in d["people"]}
        drawn = world.questions(people, "heldout", per_attribute=2, seed=seed * 1000 + night)
        documents.append([d["text"] for d in day])
        probes.append([Question(q.text, q.answer, q.kind, home[q.person]) for q in drawn])
    old = world.questions(world.old_people(), "heldout", kinds=("recall",), seed=seed)
    some = random.Random(f"old-{seed}").sample(
        old, min(config.evaluation.retention_questions, len(old))
    )
    known = [Question(q.text, q.answer, "retention") for q in some]
    texts = world.old_world_text(seed, "heldout", config.evaluation.perplexity_texts)
    return Days(documents, probes, known, texts)


# --- a chain --------------------------------------------------------------------------


class InProcess:
    """Runs the consolidation's loop in this process; it has no checkpoints and stores only the end report."""

    def __init__(self) -> None:
        self.end: JobEnd | None = None

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        yield None

    def save_checkpoint(self, step: int, directory: Path) -> None:
        pass

    def report(self, report: Report) -> None:
        if isinstance(report, JobEnd):
            self.end = report


@dataclass
class Lab:
    """The settings and processes that all chains share."""

    config: NightConfig
    pool: EnginePool
    base: Path
    """The embedded model with slots for every night."""
    work: Path
    console: Console
    settings: Sequence[str]
    """The part of ``config`` that differs from a night's defaults and may change what is learned."""
    variant: str = ""
    """Name of these settings; empty for the default ones."""

    def __post_init__(self) -> None:
        self.chat = ChatFormatter(self.base)


def chain(
    lab: Lab, method: str, seed: int, nights: int, rate: float, place: Path
) -> dict[str, Any]:
    """Run the nights of a chain that its record lacks.

    Exits where the record has other settings, or where its last model is gone; it never replaces a
    record.

    Args:
        lab: The shared settings and processes.
        method: A name in ``METHODS``, or ``IN_CONTEXT``.
        seed: Seed of the chain.
        nights: Number of nights.
        rate: Learning rate.
        place: File of the record.

    Returns:
        The complete record.
    """
    lived = days(seed, nights, lab.config)
    made_with = {"rate": rate, "settings": lab.settings}
    models, record = lab.work / place.stem, None
    if place.is_file():
        record = json.loads(place.read_text())
        done, found = len(record["nights"]), {name: record.get(name) for name in made_with}
        if found != made_with:
            sys.exit(f"{place} is of {found}, not of {made_with}; move it away to make another")
        if done < nights and not (models / f"after-{done}").is_dir():
            sys.exit(f"{place} has {done} nights and {models} no model to go on from; move it away")
    if record is None:
        lab.pool.publish(all_tensors(lab.base))
        before = examine(lab, lived, 0, with_context=False)["retention"]
        described = {"method": lab.variant or method, "seed": seed, **made_with, "before": before}
        record = {**described, "nights": []}
    for night in range(len(record["nights"]), nights):
        before, after = models / f"after-{night}", models / f"after-{night + 1}"
        start = before if night and method != IN_CONTEXT else lab.base
        lab.pool.publish(all_tensors(start))
        learnt: dict[str, Any] = {}
        if method == IN_CONTEXT:
            after.mkdir(parents=True, exist_ok=True)
        else:
            began = time.perf_counter()
            learnt = learn_day(
                lab, method, seed * 1000 + night, night, rate, lived.documents[night], start, after,
            )  # fmt: skip
            learnt |= {"seconds": time.perf_counter() - began, "parameters": parameters(after)}
        seen = examine(lab, lived, night, with_context=method == IN_CONTEXT)
        record["nights"].append({**seen, **learnt})
        record["environment"] = describe_environment()
        write_json_atomic(place, record)
        shutil.rmtree(before, ignore_errors=True)
        line = f"recall so far {fmean(seen['recall']):.1%}, retention {seen['retention']:.1%}"
        lab.console.print(f"{record['method']} seed {seed}, night {night + 1} of {nights}: {line}")
    return record


def learn_day(
    lab: Lab, method: str, seed: int, night: int, rate: float, documents: list[str],
    before: Path, after: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train for one night. The engine serves ``before`` at the start and ``after`` at the end."""
    config, chat = lab.config, lab.chat
    longest = config.model.max_length
    # Texts that a method does not read are not generated.
    wanted, reads = config.self_study, METHODS[method].texts
    if REPLAY not in reads:
        wanted = replace(wanted, replay_questions=config.fixed_capacity.fisher_texts)
    scratch = after.with_name("scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    steps = transfers(config, before, night) if METHODS[method].grows else [None]
    bank = question_bank.load(before)
    cost = {"tokens": 0, "steps": 0}
    for number, step in enumerate(steps):
        if reads == (PASSAGE,):
            written = Study([])
        elif step is None or step.teacher_has_context:
            sampler = TextSampler(lab.pool, chat, wanted, seed, longest)
            written = write_study(sampler, documents, question_bank=bank)
            bank = written.question_bank
        else:
            sampler = TextSampler(lab.pool, chat, wanted, seed + number, longest)
            written = write_rehearsal(sampler, bank)
        place = scratch / str(number)
        Lake(place / "lake").append(to_batch(written.trajectories), "trajectories")
        seeding = config.consolidation
        job = Job(
            method=method,
            learner=replace(
                build_trainer_options(config, before, step, "float32", rate, seeding.steps),
                seed=seed,
            ),
            config=seeding,
            fixed=config.fixed_capacity,
            seed=seed,
            lake=str(place / "lake"),
            output=str(place),
            canary=chat.prompt(documents[0])[:64],
            first_version=lab.pool.version + 1,
            passages=[chat.text(text)[:longest] for text in documents],
        )
        shell = InProcess()
        tokens = TOKENS if lab.variant in WHOLE else TOKENS // len(steps)
        learn(limit_to_budget(job, tokens), lab.pool.group.actors, shell)
        gc.collect()
        assert shell.end is not None
        lab.pool.record_update(shell.end.version)
        cost = {name: cost[name] + getattr(shell.end, name) for name in cost}
        target = after if number == len(steps) - 1 else place / "self"
        with atomic_directory(target, overwrite=True) as directory:
            if step is not None:
                slots = Slots.load(before)
                assert slots is not None
                update(before, directory, slots, step, load_file(place / EXPERT))
            else:
                shutil.copytree(before, directory, dirs_exist_ok=True)
                tensors = {**load_file(before / WEIGHTS), **load_file(place / WEIGHTS)}
                save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
            question_bank.save(bank, directory)
        before = target
    shutil.rmtree(scratch)
    return cost


def transfers(config: NightConfig, before: Path, night: int) -> list[Transfer]:
    """List the transfers of a night, counted from 0, that starts from ``before``."""
    clock, slots = config.memory.clock(), Slots.load(before)
    assert slots is not None
    for _ in range(night):
        clock.advance(1)
    steps = steps_of(config, slots, clock.advance(1))
    found = [step for step in steps if isinstance(step, Transfer)]
    assert len(found) == len(steps), "no level of these chains is ever full"
    return found


def parameters(checkpoint: Path) -> int:
    """Count the parameters of the model with its filled slots; empty slots do not count."""
    slots = Slots.load(checkpoint)
    assert slots is not None
    total = sum(tensor.numel() for tensor in load_file(checkpoint / WEIGHTS).values())
    mlps = sum(tensor.numel() for _, tensor in mlp_tensors(checkpoint))
    return total - mlps * (slots.count - len(slots.used)) * slots.width // slots.total_width


def examine(lab: Lab, lived: Days, night: int, *, with_context: bool) -> dict[str, Any]:
    """Measure the model in the engine after a night.

    Args:
        lab: The shared settings and processes.
        lived: The days of the chain.
        night: The night, counted from 0.
        with_context: Whether the prompt contains a document.

    Returns:
        ``recall`` and ``two_hop`` of every day so far, oldest first; ``reading``, tonight's recall
        with the text in the prompt, which limits the teacher; ``retention`` and ``perplexity`` of
        the old world.
    """
    tonight = lived.documents[night]
    old = [replace(one, experience=tonight[n % len(tonight)]) for n, one in enumerate(lived.old)]
    probes = [*old]
    for day in lived.probes[: night + 1]:
        probes += day
    answers = ask(
        lab.pool, lab.chat, probes, with_context=with_context,
        max_tokens=lab.config.evaluation.max_tokens,
    )  # fmt: skip
    right = dict(zip(map(id, probes), grade(answers, probes), strict=True))

    def share(kind: str, among: Sequence[Question]) -> float:
        return fmean(right[id(probe)] for probe in among if probe.kind == kind)

    past, newest = lived.probes[: night + 1], lived.probes[night]
    read = ask(
        lab.pool, lab.chat, newest, with_context=True,
        max_tokens=lab.config.evaluation.max_tokens,
    )  # fmt: skip
    return {
        "recall": [share("recall", day) for day in past],
        "two_hop": [share("two_hop", day) for day in past],
        "reading": fmean(grade(read, newest)),
        "retention": share("retention", old),
        "perplexity": measure_perplexity(
            lab.pool, lab.chat, lived.texts, lab.config.model.max_length - 1
        )[0],
    }


# --- learning rates ---------------------------------------------------------------------


def tune(lab: Lab, methods: Sequence[str]) -> None:
    """Tune the learning rate of each method that trains: hill climbing, by factors of three.

    The score is the trade-off of recall and retention after three nights of an unreported seed.
    After fewer nights, rates win that forget everything by the tenth. Ablations of Sleep that grow
    as it does use its rate.
    """
    for method in methods:
        if method == IN_CONTEXT or (METHODS[method].grows and method != "seeding"):
            continue
        scores = tuned(method)

        def score(rate: float, method: str = method, scores: dict[float, float] = scores) -> float:
            if rate not in scores:
                place = lab.work / f"tune-{method}-{rate:g}.json"
                lived = chain(lab, method, TUNING_SEED, TUNING_NIGHTS, rate, place)
                end = lived["nights"][-1]
                scores[rate] = trade_off(fmean(end["recall"]), end["retention"], lived["before"])
                with locked(TUNING.with_suffix(".lock")):
                    known = json.loads(TUNING.read_text()) if TUNING.is_file() else {}
                    known[method] = {f"{each:g}": scores[each] for each in sorted(scores)}
                    write_json_atomic(TUNING, known)
            return scores[rate]

        best = max(scores, key=lambda rate: scores[rate], default=start_rate(lab.config, method))
        for factor in (3.0, 1 / 3.0):
            while score(rounded(best * factor)) > score(best):
                best = rounded(best * factor)
        lab.console.print(f"{method}: {best:g}, trade-off {scores[best]:.3f}")


def tuned(method: str) -> dict[float, float]:
    """Return the scores of a method by learning rate."""
    known = json.loads(TUNING.read_text()) if TUNING.is_file() else {}
    return {float(rate): score for rate, score in known.get(method, {}).items()}


def rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def start_rate(config: NightConfig, method: str) -> float:
    return METHODS[method].learning_rate(method, config.consolidation, config.fixed_capacity)


def rate_of(config: NightConfig, method: str) -> float:
    """Return the tuned rate; exits if there is none, since the default is tuned for another method."""
    if method == IN_CONTEXT:
        return 0.0
    name = "seeding" if METHODS[method].grows else method
    scores = tuned(name)
    if not scores:
        sys.exit(f"the learning rate of {name} is not tuned: --tune --methods {name}")
    return max(scores, key=lambda rate: scores[rate])


# --- running it -----------------------------------------------------------------------------


@contextmanager
def laboratory(
    words: Sequence[str], nights: int, work: Path, console: Console, variant: str = ""
) -> Iterator[Lab]:
    """Start Ray and one engine, with this process as the only rank of a learner."""
    import deepspeed  # imported late: it takes seconds and prints

    warnings.filterwarnings("ignore", category=FutureWarning)
    levels = f"memory.levels=[{{period: {nights}, slots: {nights}}}]"
    even = nights + nights % 2  # a period of the slower level
    sets = [word.format(nights=even) for word in VARIANTS[variant]] if variant else []
    config = cfg.load(None, [levels, *SETTINGS, *sets, *words])
    work.mkdir(parents=True, exist_ok=True)
    base, empty = work / f"base{variant}", new_slots(config)
    growth_named(config.memory.growth).add_slots(
        find_model(config), base, empty.pools, empty.width, "float32"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    with cluster(config.resources):
        options = EngineOptions.from_config(config, str(base.resolve()), "float32")
        resources = config.resources
        pool = EnginePool.launch(1, options, resources.engine_cpus, 0, resources.engine)
        try:
            overrides = [*SETTINGS, *sets, *(w for w in words if not w.startswith("resources."))]
            yield Lab(config, pool, base, work, console, overrides, variant)
        finally:
            pool.shutdown()
    # Torch's alone leaves DeepSpeed's group behind, which is there if anything was trained.
    group = deepspeed.comm if deepspeed.comm.is_initialized() else dist
    group.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value for every night")
    everything = [IN_CONTEXT, *METHODS]
    parser.add_argument("--methods", nargs="*", choices=everything, default=everything)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nights", type=int, default=NIGHTS)
    parser.add_argument("--tune", action="store_true", help="tune the learning rates instead")
    parser.add_argument("--show", action="store_true", help="only show what is there")
    parser.add_argument("--work", type=Path, default=Path("runs/continual"))
    arguments = parser.parse_args()
    console, nights = Console(), arguments.nights
    if nights < 2:
        parser.error(f"--nights {nights}: what is kept shows after two nights at the earliest")
    CHAINS.mkdir(parents=True, exist_ok=True)
    for variant in [] if arguments.show else ["", *arguments.variants]:
        methods = ["seeding"] if variant else arguments.methods
        if not methods or (variant and arguments.tune):
            continue
        work = arguments.work / f"{nights}-nights"
        with laboratory(arguments.words, nights, work, console, variant) as lab:
            if arguments.tune:
                tune(lab, methods)
                return
            for seed in arguments.seeds:
                for method in methods:
                    place = CHAINS / f"{variant or method}-{seed}.json"
                    chain(lab, method, seed, nights, rate_of(lab.config, method), place)
    result = summarise(nights)
    if not result["methods"]:
        console.print(f"no chain of {nights} nights is finished")
        return
    name = "continual" if nights == NIGHTS else f"continual-{nights}"
    write_json_atomic(RESULTS / f"{name}.json", result)
    draw(nights, RESULTS / f"{name}.svg")
    show(result, console)


if __name__ == "__main__":
    main()
