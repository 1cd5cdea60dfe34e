"""Rewards in the forms in which people have them: a class, or a function, also of TRL or verl.

A reward's process imports this module, so it imports neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sleeprl.dreaming.types import Dream, Reward
from sleeprl.plugins import create, form_arguments, resolve, reward_form


def make_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """Make a reward of a dream from whatever a name stands for.

    Args:
        name: Name of a reward: of a class or factory, or of a function (``plugins.REWARD_FORMS``).
        options: Keyword arguments of the class, or further ones of the function.

    Raises:
        PluginError: The reward cannot be found or created.
    """
    form = reward_form(factory := resolve(name, "reward"))
    if not form:
        made = create(name, "reward", options)
        return lambda dream: _to_score(made(dream))
    return lambda dream: _to_score(_call(factory, form, dream, options))


def _call(function: Callable[..., Any], form: str, dream: Dream, options: Mapping[str, Any]) -> Any:
    """Call a reward function with those of its form's arguments that it takes."""
    answers = [answer for _, answer in dream.task.probes]
    values = {
        "dream": dream,
        "prompts": [dream.task.message],
        "completions": [dream.text],
        "completion_ids": [dream.token_ids],
        "data_source": "sleeprl",
        "solution_str": dream.text,
        "ground_truth": answers,
        "extra_info": {"prompt": dream.task.message, "parsed": dream.parsed, "gain": dream.gain},
    }
    given = {name: values[name] for name in form_arguments(function, form)}
    value = function(**{**given, **options})
    if form != "completions":
        return value
    rewards = _finish(value)
    if not isinstance(rewards, list | tuple) or len(rewards) != 1:
        raise TypeError(f"returned {rewards!r} for one completion; return a list of one reward")
    return rewards[0]


def _to_score(value: Any) -> Any:
    """Run a coroutine to its end, and take the ``score`` out of a dictionary."""
    value = _finish(value)
    return value["score"] if isinstance(value, dict) and "score" in value else value


def _finish(value: Any) -> Any:
    """Run a coroutine to its end; return any other value as it is."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value
