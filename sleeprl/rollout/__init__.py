"""Rollout engines and the pool that generates on all of them and updates all of them."""
