"""A causal model as the learner uses it: hidden states where a response is predicted, then the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sleeprl.trainer import packed_attention as attention
from sleeprl.trainer.packed_attention import PackedSequences

Within = Callable[..., Any]
"""What is made of hidden states [B, R, H] and the head [V, H] while the head is there; of a
model with a critic it may also ask for ``critic_BR``."""


class HeadWithLoss(nn.Linear):
    """A language head that lends its weight: logits of a whole batch are never made."""

    @classmethod
    def of(cls, linear: nn.Linear) -> HeadWithLoss:
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden_BRH: Tensor, within: Within) -> Any:  # type: ignore[override]
        return within(hidden_BRH, self.weight)


class ResponseModel(nn.Module):
    """The hidden states at the positions that predict a response token, and what ``within``
    makes of them. ZeRO-3 gathers the head's weight for that moment only.

    critic: a linear value of each such state. It reads the policy's states and leaves them alone.
    """

    def __init__(self, model: nn.Module, *, critic: bool = False) -> None:
        super().__init__()
        attention.use(model)
        self.model = model
        self.critic: nn.Linear | None = None
        head: Any = model.get_submodule("lm_head")
        assert isinstance(head, nn.Linear) and "bias" not in dict(head.named_parameters())
        if critic:
            weight = head.weight
            self.critic = nn.Linear(
                head.in_features, 1, bias=False, dtype=weight.dtype, device=weight.device
            )
            nn.init.zeros_(self.critic.weight)
        model.set_submodule("lm_head", HeadWithLoss.of(head))

    def forward(
        self,
        within: Within,
        ids_ST: Tensor,
        attends: Tensor | PackedSequences,
        index_BR: Tensor,
        *,
        judged: bool = False,
    ) -> Any:
        """Of ``layout.inputs``: a mask [S, T] of padded texts, or the texts of one sequence.

        judged: give ``within`` the critic's values.
        """
        decoder: Any = self.model.get_submodule("model")
        if isinstance(attends, PackedSequences):
            hidden_1TH = decoder(ids_ST, use_cache=False, **attention.asked(attends))[0]
            hidden_BRH = hidden_1TH[0][index_BR]
        else:
            hidden_STH = decoder(ids_ST, attends, use_cache=False)[0]
            index_BRH = index_BR[..., None].expand(-1, -1, hidden_STH.shape[-1])
            hidden_BRH = hidden_STH.gather(1, index_BRH)
        if judged:
            assert self.critic is not None, "this model has no critic"
            within = partial(within, critic_BR=self.critic(hidden_BRH.detach()).squeeze(-1).float())
        return self.model.get_submodule("lm_head")(hidden_BRH, within)


def all_logits(hidden_BRH: Tensor, head_VH: Tensor) -> Tensor:
    """The plain thing, [B, R, V]; for single texts."""
    return hidden_BRH @ head_VH.T
