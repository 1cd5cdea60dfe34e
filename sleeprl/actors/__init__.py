"""Ray actor groups: rollout engines, scorers, learners, and their health."""
