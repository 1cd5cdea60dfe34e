"""Atomic files and what a machine offers."""
