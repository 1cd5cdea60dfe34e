"""Keep a trainer's state in a directory: one file for all ranks, and one teacher cache for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sleeprl.pretrained import save_tensors
from sleeprl.trainer.trainer import Trainer

_STATE, _TEACHER_CACHE = "learner.safetensors", "taught-{rank}.safetensors"


@dataclass(frozen=True)
class TrainerCheckpoint:
    """Save and restore trainers. Ranks may write into copies that are put together afterwards.

    The order is: ``Trainer.state_dict`` on every rank, since it is collective; ``save_state`` on
    rank 0; ``save_teacher_cache`` on every rank.
    """

    directory: Path
    """Exists when something is saved in it."""

    def save_state(self, state: Mapping[str, Tensor]) -> None:
        """Write what ``Trainer.state_dict`` returned."""
        save_tensors(state, self.directory / _STATE)

    def save_teacher_cache(self, trainer: Trainer) -> None:
        """Write what this rank remembers of its teacher."""
        save_tensors(trainer.smaller_self.cache.state_dict(), self._teacher_cache(trainer.rank))

    def restore(self, trainer: Trainer) -> None:
        """Load the state and the teacher's cache into a trainer of any world size. Collective."""
        trainer.load_state_dict(load_file(self.directory / _STATE))
        own = self._teacher_cache(trainer.rank)
        # A rank reads its own cache alone, as in an unbroken run; only a rank that is new reads
        # those of all others.
        caches = (
            [own] if own.is_file() else sorted(self.directory.glob(_TEACHER_CACHE.format(rank="*")))
        )
        for path in caches:
            trainer.smaller_self.cache.load_state_dict(load_file(path))

    def _teacher_cache(self, rank: int) -> Path:
        return self.directory / _TEACHER_CACHE.format(rank=rank)
