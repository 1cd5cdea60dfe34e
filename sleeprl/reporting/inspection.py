"""Shows the trajectories of a run as a list, and one of them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.table import Table

from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import Trajectory, from_batch
from sleeprl.text.chat import ChatFormatter
from sleeprl.utils.terminal_text import Text

_UID_WIDTH = 24
"""Columns of a longest uid that is not wrapped."""


class NothingToInspect(ValueError):
    """Raised for a directory without trajectories, and where none of them has what was asked for."""


def inspect_run(
    run: Path,
    *,
    purpose: str | None = None,
    task: str | None = None,
    uid: str | None = None,
    limit: int = 20,
) -> RenderableType:
    """Return what ``sleeprl inspect`` prints: texts with tokens, versions, rewards and advantages.

    Advantages are those that the trainer used. They cannot be computed from the list, because many
    algorithms compute them from a whole update, of which the list may hold a part.

    Args:
        run: Directory of a run.
        purpose: List trajectories of this purpose only.
        task: List trajectories of this task only.
        uid: Show this trajectory token by token.
        limit: List at most so many.

    Raises:
        NothingToInspect: There is no such run or no such trajectory; the message says what there is.
    """
    lake, chat = Lake(run / "lake"), _load_chat(run)
    if not lake.files(TRAJECTORIES):
        raise NothingToInspect(f"{run} has no trajectories; give the directory of a run")
    table = lake.read(TRAJECTORIES)
    for column, wanted in (("purpose", purpose), ("task_id", task), ("uid", uid)):
        if wanted is not None:
            known = table.column(column).unique().to_pylist()
            table = table.filter(pc.equal(table.column(column), wanted))
            if not table.num_rows:
                raise NothingToInspect(
                    f"no trajectory of {run} has {column}={wanted!r}; there are {_join_some(known)}"
                )
    if uid is not None:
        return _token_view(from_batch(table)[0], chat)
    first = from_batch(table.slice(0, limit))
    return Group(
        _trajectory_table(first, chat), _counts_line(table.column("purpose").to_pylist(), limit)
    )


def _load_chat(run: Path) -> ChatFormatter:
    """Load the chat format of the model as the night began."""
    directory = run / "smaller-self-0"
    if not directory.is_dir():
        raise NothingToInspect(f"{run} is not the directory of a night: it has no {directory.name}")
    return ChatFormatter(directory)


def _trajectory_table(trajectories: Sequence[Trajectory], chat: ChatFormatter) -> Table:
    """Return a row for each trajectory. A narrow terminal wraps uids and texts, never a number."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("uid", overflow="fold", max_width=_UID_WIDTH)
    for name in ("tokens", "versions"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reward", justify="right", overflow="fold", min_width=6)
    table.add_column("advantage", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", ratio=1, min_width=12)
    for t in trajectories:
        cut = "" if t.finish_reason == "stop" else f" [{t.finish_reason}]"
        table.add_row(
            Text(t.uid),
            f"{len(t.prompt_ids)}+{len(t.response_ids)}",
            _format_versions(t.versions),
            Text(t.unscored or _format_number(t.reward)),
            _format_number(t.advantage),
            Text(" ".join(chat.decode(t.response_ids).split()) + cut),
        )
    return table


def _counts_line(purposes: Sequence[str], limit: int) -> Text:
    counts = ", ".join(f"{purposes.count(p)} {p}" for p in dict.fromkeys(purposes))
    more = f"; the first {limit} are shown" if len(purposes) > limit else ""
    return Text(f"\n{len(purposes)} trajectories: {counts}{more}", style="dim")


def _token_view(t: Trajectory, chat: ChatFormatter) -> RenderableType:
    """Return the prompts, then a line for each token of the response."""
    parts: list[RenderableType] = [Text.assemble(("prompt  ", "bold"), chat.decode(t.prompt_ids))]
    if t.teacher_prompt_ids is not None:
        parts.append(Text.assemble(("teacher ", "bold"), chat.decode(t.teacher_prompt_ids)))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("token", overflow="fold")
    for name in ("log-probability", "reference", "version"):
        table.add_column(name, justify="right", no_wrap=True)
    references: Sequence[float | None] = t.ref_logprobs or [None] * len(t.response_ids)
    for token, logprob, reference, version in zip(
        t.response_ids, t.logprobs, references, t.versions, strict=True
    ):
        text = repr(chat.tokenizer.decode([token]))[1:-1]
        table.add_row(Text(text), _format_number(logprob), _format_number(reference), str(version))
    end = (
        f"reward {t.unscored or _format_number(t.reward)}, finished by {t.finish_reason}, {t.meta}"
    )
    return Group(*parts, table, Text(end, style="dim", overflow="fold"))


def _format_versions(versions: Sequence[int]) -> str:
    """Format the policy versions of a response: 3, or 3-4 where new weights came meanwhile."""
    low, high = min(versions, default=0), max(versions, default=0)
    return str(low) if low == high else f"{low}-{high}"


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _join_some(values: Sequence[str], count: int = 6) -> str:
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(values[:count]) + more
