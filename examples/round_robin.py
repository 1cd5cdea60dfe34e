"""A curriculum of one's own: every task in turn, the hardest ones twice.

sleeprl night examples/round_robin.yaml
"""


class RoundRobin:
    def __init__(self, tasks, seed, repeat_above=1.0):
        self.tasks, self.repeat_above = {t.id: t for t in tasks}, repeat_above
        self.order = list(self.tasks)

    def next(self, n):
        chosen, self.order = self.order[:n], self.order[n:] + self.order[:n]
        return [self.tasks[i] for i in chosen]

    def observe(self, outcomes):
        hard = [o.task for o in outcomes if o.gap > self.repeat_above]
        self.order = hard + self.order

    def state_dict(self):
        return {"order": self.order}

    def load_state_dict(self, state):
        self.order = state["order"]
