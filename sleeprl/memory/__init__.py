"""What grows: experts, the slots they live in, and the plain checkpoint they become."""
