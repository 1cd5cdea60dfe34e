"""What a model knows: probes, grades, and the figures of before and after."""
