"""``sleeprl inspect``: the trajectories of a run, as a list, and one of them token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sleeprl.chat import Chat
from sleeprl.losses.algorithms.base import Scores
from sleeprl.registry import create
from sleeprl.settings import DreamingConfig
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import Trajectory, from_batch

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
    """What a run's engines wrote. purpose, task: only these. uid: this one, token by token."""
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
    found = from_batch(table)
    advantages = dict(zip((t.uid for t in found), _advantages(run, found), strict=True))
    if uid is not None:
        return _tokens(found[0], chat)
    return Group(_list(found[:limit], advantages, chat), _counts(found, limit))


def _chat(run: Path) -> Chat:
    """Of the model as the night began."""
    directory = run / "smaller-self-0"
    if not directory.is_dir():
        raise NothingToInspect(f"{run} is not the directory of a night: it has no {directory.name}")
    return Chat(directory)


def _advantages(run: Path, found: Sequence[Trajectory]) -> list[float | None]:
    """As the run's algorithm sees them: dreams written together are a group. With a critic, whose
    word is not kept, they are the rewards."""
    path, dreaming = run / "config.yaml", DreamingConfig()
    told = yaml.safe_load(path.read_text())["dreaming"] if path.is_file() else vars(dreaming)
    algorithm = create(told["algorithm"], "algorithm", told["algorithm_options"])
    scores = Scores(
        rewards=[t.reward for t in found],
        groups=[t.uid.rpartition("-")[0] for t in found],
        lengths=[len(t.response_ids) for t in found],
        limit=told["max_tokens"],
    )
    return list(algorithm.advantages(scores))


def _list(found: Sequence[Trajectory], advantages: Mapping[str, float | None], chat: Chat) -> Table:
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
            _number(advantages[t.uid]),
            Text(" ".join(chat.decode(t.response_ids).split()) + cut),
        )
    return table


def _counts(found: Sequence[Trajectory], limit: int) -> Text:
    purposes = [t.purpose for t in found]
    told = ", ".join(f"{purposes.count(p)} {p}" for p in dict.fromkeys(purposes))
    more = f"; the first {limit} are shown" if len(found) > limit else ""
    return Text(f"\n{len(found)} trajectories: {told}{more}", style="dim")


def _tokens(t: Trajectory, chat: Chat) -> RenderableType:
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
