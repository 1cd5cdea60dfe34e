"""Hyper-parameter search of a consolidation with Ray Tune: recall, subject to retention.

    python tuning/search.py tuning/consolidation.yaml

One evening (day, smaller self, self-study) is prepared once and one engine is started once. Every
trial consolidates from the same texts and is measured on that engine while it trains. ASHA stops
trials early on ``score``: recall, minus ten times the loss of retention beyond the gate's
tolerance. The search writes ``trials.json`` and ``best.yaml`` into the run directory; ``sleeprl
night best.yaml`` runs the tuned night. A repeated search reuses its evening; another search needs
another ``name``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from rich.console import Console
from rich.table import Table

from sleeprl.cluster.runtime import cluster
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.config.validation import validate_plugins
from sleeprl.models.catalogue import CATALOGUE
from sleeprl.models.check import check_model
from sleeprl.models.resolve import find_model
from sleeprl.night.context import Night
from sleeprl.night.orchestrator import run_evening
from sleeprl.night.phases import PHASES, rows_of, run_transfer
from sleeprl.night.run_dir import CONFIG, STATE, RunDirectory
from sleeprl.reporting.progress import NightProgress
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.utils.files import write_json_atomic, write_text_atomic
from sleeprl.utils.machine import available_cpus

KINDS = {"choice": tune.choice, "uniform": tune.uniform, "loguniform": tune.loguniform}
EVENING = (STATE, "day.json", "study.json", "lake", "smaller-self-0")
SEARCH = "search.json"
SEARCHED = "consolidation."


def search_space(spec: dict[str, Any]) -> dict[str, Any]:
    """Build the search space from ``{key: {choice: [...]}}``, or ``uniform`` / ``loguniform`` with
    ``[low, high]``."""
    made = {}
    for key, value in spec.items():
        if not key.startswith(SEARCHED):
            raise ConfigError(
                f"space: {key!r} is not of the consolidation, and a trial does nothing else with what one "
                f"evening prepared for all: its score would be noise; give {SEARCHED}*, or set it for all "
                "under night"
            )
        if not cfg.is_key(key):
            raise ConfigError(f"space: unknown key {key!r}; `sleeprl night --dry-run` lists all")
        kind = next(iter(value), "")
        if len(value) != 1 or kind not in KINDS:
            raise ConfigError(f"space: {key}={dict(value)} must be one of {', '.join(KINDS)}")
        values = list(value[kind])
        made[key] = tune.choice(values) if kind == "choice" else KINDS[kind](*values)
    return made


def score(figures: dict[str, Any], before: dict[str, Any], tolerance: float) -> float:
    """Compute recall minus ten times the loss of retention beyond ``tolerance`` (all are shares)."""
    lost = (before["retention"] or 0.0) - (figures["retention"] or 0.0)
    return float((figures["recall"] or 0.0) - 10.0 * max(0.0, lost - tolerance))


def words_of(choice: dict[str, Any]) -> list[str]:
    """Format the choice as ``key=value`` words."""
    return [f"{key}={json.dumps(value)}" for key, value in choice.items()]


def night_of(night: dict[str, Any], words: list[str]) -> NightConfig:
    """Build the configuration as ``sleeprl night`` does, on top of the catalogue's settings of its model."""
    return cfg.from_dict(night, words, {spec.name: spec.night for spec in CATALOGUE.values()})


def tuned(night: dict[str, Any], words: list[str], choice: dict[str, Any]) -> str:
    """Render the night with a choice as YAML for ``sleeprl night``."""
    over = [OmegaConf.from_dotlist([word]) for word in [*words, *words_of(choice)]]
    return OmegaConf.to_yaml(OmegaConf.merge(night, *over))


def refuse_other(config: NightConfig, described: dict[str, Any]) -> None:
    """Refuse to mix two searches, or a search and a night, in one directory.

    Raises:
        ConfigError: The directory has another search, or a night.
    """
    path = config.run_dir / SEARCH
    found = json.loads(path.read_text()) if path.is_file() else None
    if (config.run_dir / CONFIG).is_file() and found != described:
        raise ConfigError(
            f"name={config.name!r}: {config.run_dir} holds "
            f"{'a night' if found is None else 'a search with other settings'}; "
            "give this search another name=..."
        )


def quiet() -> NightProgress:
    return NightProgress(rows_of(PHASES), Console(file=open(os.devnull, "w")))


def trial(
    choice: dict[str, Any], settings: dict[str, Any], evening: str, pool: EnginePool, every: int
) -> None:
    """Consolidate with ``choice`` from the evening's texts, and report every ``every`` steps."""
    config = cfg.from_dict(settings, words_of(choice))
    config.runs, config.name = str(Path.cwd()), "trial"
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for name in EVENING:
        source, target = Path(evening) / name, config.run_dir / name
        if source.is_dir():
            target.symlink_to(source)
        else:
            shutil.copy(source, target)
    night = Night(RunDirectory(config, quiet()), engines=pool)
    before = night.run.result("before")["before"]

    def report(step: int) -> None:
        if step % every == 0 or step == config.consolidation.steps:
            figures = night.measure(f"step-{step}")
            value = score(figures, before, config.gate.max_retention_drop)
            tune.report({"score": value, "step": step, **figures})

    try:
        run_transfer(night, 0, report)
    finally:
        night.stop_training()


def search(path: Path, words: list[str], console: Console) -> Path:
    """Run the search that a YAML file describes; returns the file of the best configuration."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; try tuning/consolidation.yaml")
    spec = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(spec, dict)
    space = search_space(spec["space"])
    night_spec = spec.get("night") or {}
    config = night_of(night_spec, words)
    validate_plugins(config)
    described = {**spec, "night": cfg.to_dict(config)}
    refuse_other(config, described)
    check_model(config, find_model(config))  # raises for a wrong model before anything starts
    write_json_atomic(config.run_dir / SEARCH, described)
    # A trial's driver only waits, so it gets one core on paper beyond the real ones.
    cores = config.resources.cpus or available_cpus()
    config.resources.cpus = cores + 1
    with NightProgress(rows_of(PHASES), console) as progress:
        run = RunDirectory(config, progress)
        with cluster(config.resources, state_api=True):
            night = Night(run)
            run_evening(night)
            night.stop_training()  # the trials need the cores
            results = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        trial,
                        settings=cfg.to_dict(config),
                        evening=str(run.dir.resolve()),
                        pool=night.engines,
                        every=int(spec["report_every"]),
                    ),
                    {"CPU": 1},
                ),
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    num_samples=int(spec["trials"]),
                    # The trials share the engines and their weights, so they run one at a time.
                    search_alg=BasicVariantGenerator(max_concurrent=1, random_state=config.seed),
                    scheduler=ASHAScheduler(
                        time_attr="step",
                        # One more than a trial has, so that a complete trial ends itself and cleans up.
                        max_t=config.consolidation.steps + 1,
                        grace_period=int(spec["report_every"]),
                        reduction_factor=2,
                    ),
                ),
                run_config=tune.RunConfig(
                    name="search", storage_path=str((run.dir / "tune").resolve()), verbose=0
                ),
            ).fit()
            night.close()
        run.close()
    rows = [{"config": r.config, **(r.metrics or {})} for r in results]
    write_json_atomic(run.dir / "trials.json", rows)
    best = results.get_best_result(metric="score", mode="max", scope="all")
    assert best.config is not None
    write_text_atomic(run.dir / "best.yaml", tuned(night_spec, words, best.config))
    console.print(_table(rows, list(space)))
    if results.num_errors:
        console.print(f"[red]{results.num_errors} trial(s) failed:[/] {results.errors[0]}")
    return run.dir / "best.yaml"


def _table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    table = Table(title="Trials")
    for name in [*(key.rsplit(".", 1)[-1] for key in keys), "step", "recall", "retention", "score"]:
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda r: -r.get("score", float("-inf"))):
        values = [row["config"][key] for key in keys]
        figures = [row.get(name) for name in ("step", "recall", "retention", "score")]
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in [*values, *figures]]
        table.add_row(*cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="YAML with trials, report_every, space and night")
    parser.add_argument("words", nargs="*", help="key=value for the night, such as seed=1")
    arguments = parser.parse_args()
    console = Console()
    try:
        best = search(arguments.file, arguments.words, console)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    console.print(f"Best: {best}")


if __name__ == "__main__":
    main()
