"""One night: its phases in order, its run directory, the gate and the commit."""
