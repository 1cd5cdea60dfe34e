"""The configuration of a night: its schema, loader, validation and description.

Imports neither torch nor ray.
"""
