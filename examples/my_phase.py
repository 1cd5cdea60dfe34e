"""A phase of your own: how much of each kind self-study wrote, in the night's summary.

    sleeprl night 'phases=[examples.my_phase.purposes]'

The function does the work and returns plain JSON; the row says where it stands and how it is shown.
"""

from collections import Counter

from sleeprl.data.lake import TRAJECTORIES
from sleeprl.night.context import Night
from sleeprl.night.phases import Phase


def count_purposes(night: Night) -> dict[str, int]:
    """Count the texts in the night's lake by their purpose."""
    return dict(Counter(night.lake.read(TRAJECTORIES, ["purpose"]).column("purpose").to_pylist()))


def purposes() -> Phase:
    """Describe the phase."""
    return Phase(
        key="purposes",
        title="Count: what was written",
        run=count_purposes,
        note=lambda counts: ", ".join(f"{count} {purpose}" for purpose, count in counts.items()),
        after="self_study",
        summary_key="purposes",
    )
