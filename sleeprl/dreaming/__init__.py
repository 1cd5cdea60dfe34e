"""Dreaming: RL on lessons that the model writes for itself."""
