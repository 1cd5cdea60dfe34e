"""Dreaming: the model writes its own lessons, what teaches is rewarded, and it learns from both."""
