"""Frozen judges of ``r_sem`` (method 2.4 step 2, 6.1): do two texts mean the same?

Pure: what a model has to say is passed in. The third judge, the exact one, needs no
model and is ``imitation.semantic``. All give 0 or 1, as in the paper.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def same_by_embedding(student_NE: Tensor, teacher_NE: Tensor, threshold: float = 0.8) -> Tensor:
    """1 where the cosine of two embeddings is at least ``threshold``, [N].

    Row i of both is pair i; rows need not have length 1, a zero row is like nothing.
    """
    if student_NE.shape != teacher_NE.shape:
        raise ValueError(
            f"student_NE has shape {tuple(student_NE.shape)} and teacher_NE "
            f"{tuple(teacher_NE.shape)}; give one row for each text of a pair"
        )
    cosine_N = F.cosine_similarity(student_NE.float(), teacher_NE.float(), dim=-1)
    return (cosine_N >= threshold).to(student_NE.dtype)


def same_by_verdict(yes_N: Tensor, no_N: Tensor) -> Tensor:
    """1 where a judge that was asked "same meaning? yes/no" has P(yes) >= 0.5, [N].

    yes_N, no_N: log-probabilities of the two answers, in nats; with several spellings
        of an answer, their ``logsumexp``. P is among these two, since what else the
        model might say is no verdict: it is at least 0.5 where yes >= no.
    """
    return (yes_N >= no_N).to(yes_N.dtype)
