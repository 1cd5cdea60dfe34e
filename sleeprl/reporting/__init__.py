"""What a run tells its user: metrics, waits and idle time, live progress, the HTML report."""
