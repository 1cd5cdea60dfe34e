"""Keep the teacher's targets of texts that come again, so that it reads each of them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sleeprl.trainer.batching import Targets, TrainingExample


class TeacherCache:
    """Map a text's key and the size of the teacher's top k to the teacher's targets.

    The teacher never changes, so an entry stays right for the trainer's whole life.
    """

    def __init__(self) -> None:
        self._targets: dict[tuple[str, int], Targets] = {}

    def get_or_compute(
        self,
        rows: Sequence[TrainingExample],
        k: int,
        compute: Callable[[Sequence[TrainingExample]], list[Targets]],
    ) -> list[Targets | None]:
        """Return the targets of each row, from memory where they are known.

        Args:
            rows: Texts; those without a ``key`` are not remembered.
            k: Size of the teacher's top k, part of the key.
            compute: Asks the teacher about the rows that are not known. It is called also with
                none, because the ranks ask together.
        """
        found = [self._targets.get((row.key, k)) if row.key else None for row in rows]
        missing = [index for index, target in enumerate(found) if target is None]
        computed = compute([rows[index] for index in missing])
        for index, target in zip(missing, computed, strict=True):
            found[index] = target
            if key := rows[index].key:
                self._targets[key, k] = target
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return all targets by one name each, for a checkpoint.

        The teacher could be asked again, but in other batches, and the last bit of an answer
        depends on its batch.
        """
        return {
            f"{k}:{number}:{key}": part
            for (key, k), parts in self._targets.items()
            for number, part in enumerate(parts)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Add what ``state_dict`` gave, of this rank or another; known entries stay."""
        loaded: dict[tuple[str, int], Targets] = {}
        for name in sorted(state):
            k, _, key = name.split(":", 2)
            loaded[key, int(k)] = (*loaded.get((key, int(k)), ()), state[name])
        self._targets = loaded | self._targets
