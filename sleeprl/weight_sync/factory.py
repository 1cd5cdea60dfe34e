"""Transports by name. Apart from ``base``, so that transports may import their contract."""

from __future__ import annotations

from typing import Any

from sleeprl.plugins import resolve
from sleeprl.weight_sync.base import TransportConfig, WeightTransport


def transport_class(kind: str) -> type[WeightTransport]:
    """Return the plug-in of kind ``transport`` with that name, for its capabilities.

    Raises:
        PluginError: there is none.
    """
    found: Any = resolve(kind, "transport")
    return found  # type: ignore[no-any-return]


def make_transport(config: TransportConfig) -> WeightTransport:
    """Make the sender's side of a transport.

    Raises:
        PluginError: there is no such transport.
        TransportError: this machine cannot run it.
    """
    return transport_class(config.kind)(config)
