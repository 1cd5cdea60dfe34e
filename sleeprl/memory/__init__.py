"""Memory that grows: experts, their slots, levels and clock, and the plain checkpoint."""
