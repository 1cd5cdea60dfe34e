"""A causal model as the learner uses it: hidden states where a response is predicted, then the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Within = Callable[[Tensor, Tensor], Any]
"""What is made of hidden states [B, R, H] and the head [V, H] while the head is there."""


class Head(nn.Linear):
    """A language head that lends its weight: logits of a whole batch are never made."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Head:
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head

    def forward(self, hidden_BRH: Tensor, within: Within) -> Any:  # type: ignore[override]
        return within(hidden_BRH, self.weight)


class ResponseModel(nn.Module):
    """The hidden states at the positions that predict a response token, and what ``within``
    makes of them. ZeRO-3 gathers the head's weight for that moment only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head: Any = model.get_submodule("lm_head")
        assert isinstance(head, nn.Linear) and "bias" not in dict(head.named_parameters())
        model.set_submodule("lm_head", Head.of(head))

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, index_BR: Tensor, within: Within) -> Any:
        decoder: Any = self.model.get_submodule("model")
        hidden_BTH = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0]
        index_BRH = index_BR[..., None].expand(-1, -1, hidden_BTH.shape[-1])
        return self.model.get_submodule("lm_head")(hidden_BTH.gather(1, index_BRH), within)


def all_logits(hidden_BRH: Tensor, head_VH: Tensor) -> Tensor:
    """The plain thing, [B, R, V]; for single texts."""
    return hidden_BRH @ head_VH.T
