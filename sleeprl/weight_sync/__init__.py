"""Weights from the trainer into the engines, verified. Never imports ray."""
