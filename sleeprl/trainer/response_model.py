"""A causal model as the trainer uses it: hidden states where a response is predicted, then the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sleeprl.trainer import packed_attention as attention
from sleeprl.trainer.packed_attention import PackedSequences

LossFn = Callable[..., Any]
"""What is computed from hidden states [B, R, H] and the head [V, H] while the head is gathered. Of a
model with a critic it may also take ``critic_BR``."""


class HeadWithLoss(nn.Linear):
    """A language head that lends its weight: logits of a whole batch are never made."""

    @classmethod
    def of(cls, linear: nn.Linear) -> HeadWithLoss:
        """Wrap the weight of a plain head."""
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden_BRH: Tensor, loss_fn: LossFn) -> Any:  # type: ignore[override]
        return loss_fn(hidden_BRH, self.weight)


class ResponseModel(nn.Module):
    """Give hidden states at the positions that predict a response token to a loss function.

    ZeRO-3 gathers the head's weight for that moment only. The critic is a linear value of each
    such state. It reads the policy's states and leaves them alone.
    """

    def __init__(self, model: nn.Module, *, critic: bool = False) -> None:
        """Put the model's head in a ``HeadWithLoss``; critic: add a value head."""
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
        loss_fn: LossFn,
        ids_ST: Tensor,
        attends: Tensor | PackedSequences,
        index_BR: Tensor,
        *,
        with_values: bool = False,
    ) -> Any:
        """Return what ``loss_fn`` returns.

        Args:
            loss_fn: Called with the hidden states [B, R, H] and the head [V, H].
            ids_ST: Token ids of S sequences.
            attends: A mask [S, T] of padded texts, or the texts of one packed sequence.
            index_BR: Where the hidden state of a response token is, see ``packing.inputs``.
            with_values: Give ``loss_fn`` the critic's values as ``critic_BR``.
        """
        decoder: Any = self.model.get_submodule("model")
        if isinstance(attends, PackedSequences):
            arguments = attention.model_arguments(attends)
            hidden_1TH = decoder(ids_ST, use_cache=False, **arguments)[0]
            hidden_BRH = hidden_1TH[0][index_BR]
        else:
            hidden_STH = decoder(ids_ST, attends, use_cache=False)[0]
            index_BRH = index_BR[..., None].expand(-1, -1, hidden_STH.shape[-1])
            hidden_BRH = hidden_STH.gather(1, index_BRH)
        if with_values:
            assert self.critic is not None, "this model has no critic"
            values_BR = self.critic(hidden_BRH.detach()).squeeze(-1).float()
            loss_fn = partial(loss_fn, critic_BR=values_BR)
        return self.model.get_submodule("lm_head")(hidden_BRH, loss_fn)


def all_logits(hidden_BRH: Tensor, head_VH: Tensor) -> Tensor:
    """Return the logits [B, R, V]; for single texts."""
    return hidden_BRH @ head_VH.T
