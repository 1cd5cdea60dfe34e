"""Atomic files, and the resources of the machine."""
