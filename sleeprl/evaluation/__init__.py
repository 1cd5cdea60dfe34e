"""Evaluation: questions, grading, and the figures before and after a night."""
