"""The frozen judges of the imitation reward's semantic part, by name (step 2 of Knowledge Seeding).

A judge scores pairs (student's text, teacher's text): 1 if both have the same meaning, else 0. It
does not change during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sleeprl.consolidation.imitation_reward import semantic
from sleeprl.plugins import create
from sleeprl.pretrained import load_encoder, load_tokenizer
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import NO, SAME_MEANING, YES
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer

Pairs = Sequence[tuple[str, str]]


class Judge(Protocol):
    """A judge of pairs of texts.

    Every rank calls it with the same pairs, so a judge can use the trainer's collectives. A factory
    of judges is called as ``factory(learner=..., chat=..., **options)``.
    """

    def __call__(self, pairs: Pairs) -> list[float]: ...


class Exact:
    """A judge that requires the same words; case and punctuation do not matter."""

    def __init__(self, learner: Trainer, chat: ChatFormatter) -> None:
        pass

    def __call__(self, pairs: Pairs) -> list[float]:
        return [semantic(student, teacher) for student, teacher in pairs]


class Embedding:
    """A judge that requires a minimum cosine similarity of two sentence embeddings."""

    def __init__(
        self, learner: Trainer, chat: ChatFormatter, model: str, threshold: float = 0.8
    ) -> None:
        """Load the encoder.

        Args:
            learner: Not used.
            chat: Not used.
            model: Directory or Hugging Face id of an encoder, such as all-MiniLM-L6-v2. The
                embedding is the mean of its last hidden states.
            threshold: Minimum cosine similarity.
        """
        self.tokenizer: Any = load_tokenizer(model)
        self.model: Any = load_encoder(model).eval()
        self.threshold = threshold

    def __call__(self, pairs: Pairs) -> list[float]:
        if not pairs:
            return []
        students, teachers = zip(*pairs, strict=True)
        found_N = same_by_embedding(self._embed(students), self._embed(teachers), self.threshold)
        return [float(value) for value in found_N]

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings [N, E]. An empty text gets a zero row, which is similar to nothing."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        hidden_NTE = self.model(**inputs).last_hidden_state
        mask_NT1 = inputs["attention_mask"][..., None].to(hidden_NTE.dtype)
        mean_NE = (hidden_NTE * mask_NT1).sum(1) / mask_NT1.sum(1).clamp_min(1.0)
        said_N1 = torch.tensor([[float(bool(text.strip()))] for text in texts])
        return mean_NE * said_N1


class Teacher:
    """A judge that asks the smaller self whether both texts mean the same, and compares P(yes) with P(no)."""

    def __init__(self, learner: Trainer, chat: ChatFormatter, batch: int = 64) -> None:
        self.learner, self.chat, self.batch = learner, chat, batch

    def __call__(self, pairs: Pairs) -> list[float]:
        rows = []
        for student, teacher in pairs:
            prompt = self.chat.prompt(SAME_MEANING.format(first=student, second=teacher))
            rows += [
                TrainingExample(prompt, self.chat.response(answer), "") for answer in (YES, NO)
            ]
        likely: list[float] = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            likely += [sum(values) for values in self.learner.logprobs(part, smaller=True)]
        yes_N, no_N = torch.tensor(likely).reshape(-1, 2).unbind(-1)
        return [float(value) for value in same_by_verdict(yes_N, no_N)]


def make_judge(name: str, options: dict[str, Any], learner: Trainer, chat: ChatFormatter) -> Judge:
    """Create a judge by name; every rank creates its own.

    Args:
        name: Short name, entry point or dotted path.
        options: Options of the judge.
        learner: The trainer.
        chat: Chat format of the model.
    """
    judge: Judge = create(name, "judge", {**options, "learner": learner, "chat": chat})
    return judge


def same_by_embedding(student_NE: Tensor, teacher_NE: Tensor, threshold: float = 0.8) -> Tensor:
    """Return 1 if the cosine similarity of two embeddings is at least ``threshold``, else 0.

    Args:
        student_NE: Embeddings of the students' texts; row i of both tensors is pair i. Rows need
            not have length 1. A zero row is similar to nothing.
        teacher_NE: Embeddings of the teachers' texts.
        threshold: Minimum cosine similarity.

    Returns:
        Verdicts [N].

    Raises:
        ValueError: The shapes differ.
    """
    if student_NE.shape != teacher_NE.shape:
        raise ValueError(
            f"student_NE has shape {tuple(student_NE.shape)} and teacher_NE "
            f"{tuple(teacher_NE.shape)}; give one row for each text of a pair"
        )
    cosine_N = F.cosine_similarity(student_NE.float(), teacher_NE.float(), dim=-1)
    return (cosine_N >= threshold).to(student_NE.dtype)


def same_by_verdict(yes_N: Tensor, no_N: Tensor) -> Tensor:
    """Return 1 if the answer to "same meaning? yes/no" has P(yes) >= 0.5, else 0.

    P is normalised over these two answers, because any other output is no verdict. It is at least
    0.5 if yes >= no.

    Args:
        yes_N: Log-probability of "yes", in nats; with several spellings, their ``logsumexp``.
        no_N: Log-probability of "no", in nats; likewise.

    Returns:
        Verdicts [N].
    """
    return (yes_N >= no_N).to(yes_N.dtype)
