"""The built-in reward, and the process in which a reward runs.

That process imports this module, which therefore brings neither torch nor ray.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
from collections.abc import Mapping
from typing import Any

from pebble import ProcessExpired, ProcessPool

from sleeprl.dreaming.types import Dream, Reward
from sleeprl.plugins import PluginError, create

Judgement = tuple[float | None, str | None]
"""A reward, or why there is none."""

_PR_SET_PDEATHSIG = 1


class LikelihoodGain:
    """Rewards what the dream teaches: the gain of its trial; a malformed dream teaches nothing."""

    def __init__(self, scale: float = 10.0) -> None:
        """Set the reward per nat, so that rewards are of the order of one."""
        self.scale = scale

    def __call__(self, dream: Dream) -> float | None:
        if dream.parsed is None:
            return 0.0
        return None if dream.gain is None else self.scale * dream.gain


class RewardProcess:
    """A reward in a process of its own, where nothing that it does costs more than one dream.

    Where it gives nothing in time the process is killed, and the next dream is judged in another one,
    by a new reward. The start of a process does not count.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], timeout_s: float, largest: float
    ) -> None:
        """Start the process and make the reward in it.

        Args:
            name: of the reward.
            options: its keyword arguments.
            timeout_s: seconds that it may take for one dream.
            largest: a larger number is no reward.

        Raises:
            PluginError: the reward cannot be made.
        """
        self.name, self.timeout_s, self.largest = name, timeout_s, largest
        self._arguments = (name, dict(options), os.getpid())
        self._pool = self._start()
        try:
            self._pool.schedule(_raise_fault).result()
        except RuntimeError as error:
            raise PluginError(
                f"reward {name!r} with options {dict(options)}: its process ended while it was made"
            ) from error

    def __call__(self, dream: Dream) -> Judgement:
        """Judge a dream; never raises what the reward does."""
        try:
            reward, fault = self._judge(dream)
        except TimeoutError:
            reward = None
            fault = f"gave nothing within dreaming.reward_timeout_s={self.timeout_s:g} s"
        except ProcessExpired as error:
            reward, fault = None, f"ended its process (exit code {error.exitcode})"
        except RuntimeError:
            reward, fault = None, "ended its process"
        return reward, fault and f"reward {self.name!r} {fault}"

    def close(self) -> None:
        """End the process."""
        self._pool.stop()
        self._pool.join()

    def _start(self) -> ProcessPool:
        # Spawned: a fork would inherit the locks of the actor's threads.
        context = multiprocessing.get_context("spawn")
        return ProcessPool(1, initializer=_begin, initargs=self._arguments, context=context)

    def _judge(self, dream: Dream) -> Judgement:
        """Judge a dream, in a new process where the old one has ended since the last dream.

        Raises:
            RuntimeError: the pool is broken.
        """
        try:
            return self._submit(dream)
        except RuntimeError:  # the process ended between two dreams, which breaks the pool
            self.close()
            self._pool = self._start()
            return self._submit(dream)

    def _submit(self, dream: Dream) -> Judgement:
        call = self._pool.schedule(_judge, (dream, self.largest), timeout=self.timeout_s)
        judgement: Judgement = call.result()
        return judgement


# --- in the process ---------------------------------------------------------------------------

_reward: Reward
_fault: PluginError | None = None


def _begin(name: str, options: dict[str, Any], parent: int) -> None:
    """Make the reward.

    Args:
        name: of the reward.
        options: its keyword arguments.
        parent: the actor's process.
    """
    global _reward, _fault
    # The kernel ends this process with the actor: a reward that holds the interpreter's lock lets
    # nothing in here do it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    try:
        _reward = create(name, "reward", options)
    except PluginError as error:
        _fault = error
    except BaseException as error:
        _fault = PluginError(
            f"reward {name!r} with options {options}: {type(error).__name__}: {error}"
        )
        _fault.__cause__ = error


def _raise_fault() -> None:
    if _fault is not None:
        raise _fault


def _judge(dream: Dream, largest: float) -> Judgement:
    """Judge a dream, and return plain values only: a user's exception may not survive the way to
    another process."""
    try:
        _raise_fault()
        value = _reward(dream)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        return (number, None) if abs(number) <= largest else (None, f"returned {value!r}")
    except BaseException as error:  # sys.exit, too
        return None, f"raised {type(error).__name__}: {error}"
