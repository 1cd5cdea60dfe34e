"""Consolidation: self-study, the seeding objective, and the Ray Train job that runs it."""
