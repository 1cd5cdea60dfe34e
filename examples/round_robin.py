"""A curriculum of one's own: every task in turn, the hard ones twice.

From the root of the repository: sleeprl night examples/round_robin.yaml
"""


class RoundRobin:
    def __init__(self, tasks, seed, repeat_above=1.0):
        self.tasks, self.repeat_above = {t.id: t for t in tasks}, repeat_above
        self.order, self.again = list(self.tasks), []
        self.waiting = []  # drawn in turn, and not observed yet

    def next(self, n):
        return [self.tasks[self.again.pop(0) if self.again else self.turn()] for _ in range(n)]

    def turn(self):
        task = self.order.pop(0)
        self.order.append(task)
        self.waiting.append(task)
        return task

    def observe(self, outcomes):
        for outcome in outcomes:
            if outcome.task in self.waiting:  # what comes again does so once
                self.waiting.remove(outcome.task)
                if outcome.gap > self.repeat_above:
                    self.again.append(outcome.task)

    def state_dict(self):
        return {"order": [*self.order], "again": [*self.again], "waiting": [*self.waiting]}

    def load_state_dict(self, state):
        self.order, self.again = [*state["order"]], [*state["again"]]
        self.waiting = [*state["waiting"]]
