"""Self-study: the texts that the frozen smaller self writes to train the larger self."""
