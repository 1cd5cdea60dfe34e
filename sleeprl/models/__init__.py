"""Find base models by name: checkpoints, generations, hub ids, and a catalogue of package registries."""
