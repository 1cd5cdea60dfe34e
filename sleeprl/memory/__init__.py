"""What grows: experts, the slots they live in, their levels and clock, and the plain checkpoint."""
