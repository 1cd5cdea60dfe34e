"""``sleeprl inspect``: the trajectories of a run, as a list, and one of them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch
from sleeprl.text.chat import ChatFormatter

KIND = "trajectories"


class NothingToInspect(ValueError):
    """A directory without trajectories, or a question that none of them answers."""


def inspect(
    run: Path,
    *,
    purpose: str | None = None,
    task: str | None = None,
    uid: str | None = None,
    limit: int = 20,
) -> RenderableType:
    """What a run's engines wrote. purpose, task: only these. uid: this one, token by token.

    Advantages are those that the learner used: many algorithms make them of all that an update
    has, and here some of it may be left out.
    """
    lake, chat = Lake(run / "lake"), _chat(run)
    if not lake.files(KIND):
        raise NothingToInspect(f"{run} has no trajectories; give the directory of a run")
    table = lake.read(KIND)
    for column, wanted in (("purpose", purpose), ("task_id", task), ("uid", uid)):
        if wanted is not None:
            there = table.column(column).unique().to_pylist()
            table = table.filter(pc.equal(table.column(column), wanted))
            if not table.num_rows:
                raise NothingToInspect(
                    f"no trajectory of {run} has {column}={wanted!r}; there are {_some(there)}"
                )
    if uid is not None:
        return _tokens(from_batch(table)[0], chat)
    shown = from_batch(table.slice(0, limit))
    return Group(_list(shown, chat), _counts(table.column("purpose").to_pylist(), limit))


def _chat(run: Path) -> ChatFormatter:
    """Of the model as the night began."""
    directory = run / "smaller-self-0"
    if not directory.is_dir():
        raise NothingToInspect(f"{run} is not the directory of a night: it has no {directory.name}")
    return ChatFormatter(directory)


def _list(found: Sequence[Trajectory], chat: ChatFormatter) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("uid", "tokens", "versions", "reward", "advantage"):
        right = name != "uid"
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("text", overflow="fold", ratio=1)
    for t in found:
        cut = "" if t.finish_reason == "stop" else f" [{t.finish_reason}]"
        table.add_row(
            t.uid,
            f"{len(t.prompt_ids)}+{len(t.response_ids)}",
            _span(t.versions),
            t.unscored or _number(t.reward),
            _number(t.advantage),
            Text(" ".join(chat.decode(t.response_ids).split()) + cut),
        )
    return table


def _counts(purposes: Sequence[str], limit: int) -> Text:
    told = ", ".join(f"{purposes.count(p)} {p}" for p in dict.fromkeys(purposes))
    more = f"; the first {limit} are shown" if len(purposes) > limit else ""
    return Text(f"\n{len(purposes)} trajectories: {told}{more}", style="dim")


def _tokens(t: Trajectory, chat: ChatFormatter) -> RenderableType:
    """Prompts, then a line for each token of the response."""
    parts: list[RenderableType] = [Text.assemble(("prompt  ", "bold"), chat.decode(t.prompt_ids))]
    if t.teacher_prompt_ids is not None:
        parts.append(Text.assemble(("teacher ", "bold"), chat.decode(t.teacher_prompt_ids)))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("token")
    for name in ("log-probability", "reference", "version"):
        table.add_column(name, justify="right")
    references: Sequence[float | None] = t.ref_logprobs or [None] * len(t.response_ids)
    for token, logprob, reference, version in zip(
        t.response_ids, t.logprobs, references, t.versions, strict=True
    ):
        said = repr(chat.tokenizer.decode([token]))[1:-1]
        table.add_row(Text(said), _number(logprob), _number(reference), str(version))
    told = f"reward {t.unscored or _number(t.reward)}, finished by {t.finish_reason}, {t.meta}"
    return Group(*parts, table, Text(told, style="dim"))


def _span(versions: Sequence[int]) -> str:
    """Policy versions that a response was written under: 3, or 3-4 where weights came meanwhile."""
    low, high = min(versions, default=0), max(versions, default=0)
    return str(low) if low == high else f"{low}-{high}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _some(values: Sequence[str], count: int = 6) -> str:
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(values[:count]) + more
