"""Consolidation: the seeding objective, its data and rewards, and the Ray Train job that trains on them."""
