"""Base models by name: local checkpoints, generations, hub ids, and a catalogue from package registries."""
