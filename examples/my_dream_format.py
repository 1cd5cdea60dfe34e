"""A dream format of one's own: some facts of a document, one a line, each of which is learned.

From the root of the repository: sleeprl night examples/my_dream_format.yaml
"""

from sleeprl.dreaming.formats import DreamPrompt
from sleeprl.plugins import register
from sleeprl.text.prompts import FREE_FACT, STUDY_FACT, with_experience


@register("dream_format", "facts")
class Facts:
    def __init__(self, most=3):
        self.most = most

    def prompt(self, document, num_examples):
        return DreamPrompt(with_experience(document, STUDY_FACT))

    def parse(self, text):
        facts = [line.strip() for line in text.splitlines() if line.strip()]
        return facts[: self.most] or None

    def training_pairs(self, parsed):
        return [(FREE_FACT, fact) for fact in parsed]
