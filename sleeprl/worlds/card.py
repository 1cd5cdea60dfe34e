"""The model card: what the embedded model is, how it is trained and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from sleeprl.utils.files import sha256_file
from sleeprl.worlds.model import TEMPERATURE
from sleeprl.worlds.people import OLD_SIZE
from sleeprl.worlds.vocabulary import CITIES, COMPANIES, STATED

_CARD = """# The embedded model of sleepRL

A Llama of {parameters:.1f} M parameters with its own small tokenizer, trained from nothing on a
synthetic world in plain English, so that a night of sleep can be tried on a laptop without any
download. It is of no use outside that world.

## Data

{old} *old people* with {stated} attributes each, {companies} companies and {cities} cities, all
made up by seed. Lessons are drawn at random from templates: questions about the old world by
heart; questions about random people from passages of one to three people in the context;
question-answer pairs, facts and paraphrases written from such passages; the same written freely
about the old world; plain text about it. One full name in five, and the held-out phrasings, are
never used in training: the people of the tests are not in this model. It says that it does not
know what it was not told.

## Recipe

`make embedded-model`: two runs of `python -m sleeprl.worlds.train`, the second continuing from the
first with more reading. Muon for the matrices inside the layers, AdamW for the rest, warm-up and
cosine, bfloat16 autocast; the loss weighs answers 1, plain text 0.5 and context 0.1. These weights:
{runs}.

## Measured

On held-out phrasings and never-seen people, greedy answers; writing is sampled as self-study
samples (temperature {temperature}) and judged by the world's checker.

| | share |
|---|---|
{table}

The number behind a name is how many people are in the context. `attribute_evenness` is entropy
over that of a uniform spread; `last_of_several` is how often the last of three people is written
about (even: 0.33); `perplexity` is on held-out statements about the old world.

## All figures

```json
{run}
```
"""


def write_card(directory: Path, run: dict) -> None:
    """Write the model card, ``README.md``, beside the weights.

    Args:
        directory: Directory of the checkpoint; the card states the SHA-256 of its weights.
        run: Settings, costs and figures of the training run, as plain data.
    """
    run = run | {"sha256": sha256_file(directory / "model.safetensors")}
    figures = run["figures"]
    text = _CARD.format(
        parameters=run["parameters"] / 1e6,
        old=OLD_SIZE,
        stated=len(STATED),
        companies=len(COMPANIES),
        cities=len(CITIES),
        temperature=TEMPERATURE,
        runs=";\n".join(map(_describe_training, [*filter(None, [run.get("first_run")]), run])),
        table="\n".join(f"| {name} | {value} |" for name, value in _flat(figures)),
        run=json.dumps(run, indent=1, default=str),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def read_card(directory: Path) -> dict:
    """Read the run that ``write_card`` wrote.

    Args:
        directory: Directory of the checkpoint.

    Returns:
        The ``run`` of ``write_card``, with the ``sha256`` of the weights.
    """
    text = (directory / "README.md").read_text(encoding="utf-8")
    return json.loads(text.partition("```json\n")[2].rstrip("`\n"))


def _describe_training(run: dict) -> str:
    return (
        f"{run['tokens_seen'] / 1e6:.0f} M tokens in {run['steps']} steps, "
        f"{run['training_seconds'] / 60:.0f} minutes of training, {run['total_seconds'] / 60:.0f} in "
        f"all with data and exam, on {run['device']}"
    )


def _flat(figures: dict, prefix: str = "") -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in figures.items():
        label = f"{prefix} {name}".strip().replace("_", " ")
        rows += _flat(value, label) if isinstance(value, dict) else [(label, value)]
    return rows
