"""A metric of your own: how each document goes on, as a column of the headline table.

    sleeprl night 'evaluation.metrics=[examples.my_metric.continued]'

A metric is a key, a label and, unless the questions come with the day, a function that makes them.
"""

import re
from collections.abc import Sequence

from sleeprl.evaluation.metrics import Metric
from sleeprl.evaluation.questions import Question


def ask_first_words(documents: Sequence[str], seed: int) -> list[Question]:
    """Ask how each document goes on after its first four words; it stands behind the question."""
    words = [re.findall(r"\w+", document) for document in documents]
    return [
        Question(f"What comes after: {' '.join(w[:4])}?", w[4], "continued", document)
        for w, document in zip(words, documents, strict=True)
        if len(w) > 4
    ]


def continued() -> Metric:
    """Describe the metric."""
    return Metric(key="continued", label="Continued", questions=ask_first_words)
