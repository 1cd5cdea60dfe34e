"""Questions by day, with the real engine."""

import os
import subprocess
import sys

from sleeprl import worlds
from tests.support.paths import ROOT


def test_a_question_by_day_is_answered_from_the_lake(tmp_path):
    """The real engine, which cannot know these people without the text."""
    people = worlds.fresh_people(0, 2)
    for person, document in zip(people, worlds.documents(people, 0, people_per_document=1)):
        assert person.name in document["text"]
        (tmp_path / f"{person.name}.txt").write_text(document["text"])
    asked = [q for q in worlds.questions(people, seed=0) if q.kind == "recall"]
    chosen = [next(q for q in asked if q.person == person.name) for person in people]
    words = ["wake", *(f"{person.name}.txt" for person in people)]
    for question in chosen:
        words += ["--ask", question.text]
    done = subprocess.run(
        [sys.executable, "-m", "sleeprl.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    recorded, *said = done.stdout.splitlines()
    assert recorded == "2 recorded, 0 known before, in lake"
    assert said[::2] == [question.text for question in chosen]
    for question, answer in zip(chosen, said[1::2], strict=True):
        assert worlds.is_correct(answer, question.answer), (question, answer)
