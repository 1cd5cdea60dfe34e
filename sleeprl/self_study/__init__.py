"""What the frozen smaller self writes for the larger self to learn from."""
