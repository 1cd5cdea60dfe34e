"""sleepRL: a language model that sleeps (arXiv 2606.03979)."""

__version__ = "0.1.0"
