"""Trainer to engine: buckets, transports and the proof that what arrived is what was sent."""
