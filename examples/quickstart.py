"""A night from Python: the embedded model sleeps on a few new people.

    python examples/quickstart.py

It takes about four minutes on two cores. Settings may follow: ``seed=1 wake.people=8``.
"""

from __future__ import annotations

import sys

from sleeprl import load_config, plan_night, run_night


def main(words: list[str]) -> None:
    config = load_config(overrides=["baselines=[]", *words])
    print(plan_night(config))
    result = run_night(
        config, callbacks=[lambda phase: print(f"{phase.title}: {phase.seconds:.0f} s")]
    )
    print(f"recall {result.before.recall:.0%} -> {result.after.recall:.0%}")
    print(f"with the text in the prompt: {result.before_with_context.recall:.0%}")
    print(f"report: {result.report_path}")
    print(f"generation: {result.generation.path if result.generation else result.refused}")


if __name__ == "__main__":
    main(sys.argv[1:])
