"""A curriculum of one's own: what is least known comes first.

From the root of the repository: sleeprl night examples/hardest_first.yaml
"""

from sleeprl.plugins import register


@register("curriculum", "hardest_first")
class HardestFirst:
    def __init__(self, tasks, seed):
        self.tasks, self.gaps = tasks, {task.id: 1e9 for task in tasks}  # not tried yet: first

    def next(self, n):
        order = sorted(self.tasks, key=lambda task: -self.gaps[task.id])
        chosen = [order[i % len(order)] for i in range(n)]
        self.gaps |= {t.id: min(0, self.gaps[t.id]) - 1 for t in chosen}  # being tried: last
        return chosen

    def observe(self, outcomes):
        self.gaps |= {outcome.task: outcome.gap for outcome in outcomes}

    def state_dict(self):
        return {"gaps": self.gaps}

    def load_state_dict(self, state):
        self.gaps = state["gaps"]
