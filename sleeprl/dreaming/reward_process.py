"""The built-in reward, and the process in which a reward runs.

The process imports this module, which therefore imports neither torch nor ray.
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

from sleeprl.dreaming.reward_forms import make_reward
from sleeprl.dreaming.types import Dream, Reward
from sleeprl.plugins import PluginError

Judgement = tuple[float | None, str | None]
"""A reward, or the reason why there is none."""

_PR_SET_PDEATHSIG = 1


class LikelihoodGain:
    """The built-in reward: the dream's gain, scaled; 0 for a malformed dream."""

    def __init__(self, scale: float = 10.0) -> None:
        """Create the reward.

        Args:
            scale: Reward per nat; the default makes rewards of the order of one.
        """
        self.scale = scale

    def __call__(self, dream: Dream) -> float | None:
        if dream.parsed is None:
            return 0.0
        return None if dream.gain is None else self.scale * dream.gain


class RewardProcess:
    """A reward in a process of its own, where a failure costs at most one dream.

    On a timeout the process is killed, and a new process with a new reward judges the next dream.
    The start of a process does not count towards the timeout.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], timeout_s: float, largest: float
    ) -> None:
        """Start the process and create the reward in it.

        Args:
            name: Name of the reward.
            options: Its keyword arguments.
            timeout_s: Time limit for one dream, in seconds.
            largest: Largest absolute value of a valid reward.

        Raises:
            PluginError: The reward cannot be created.
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
        """Judge a dream; failures of the reward become reasons, not exceptions."""
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
        """Judge a dream, in a new process if the old one ended since the last dream.

        Raises:
            RuntimeError: The pool is broken.
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
    """Create the reward.

    Args:
        name: Name of the reward.
        options: Its keyword arguments.
        parent: Process id of the actor.
    """
    global _reward, _fault
    # The kernel kills this process when the actor dies. No thread in here could do it while the
    # reward holds the GIL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != parent:  # the actor died before prctl
        os._exit(1)
    try:
        _reward = make_reward(name, options)
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
    """Judge a dream, and return plain values only.

    A user's exception may not survive pickling between processes.
    """
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
