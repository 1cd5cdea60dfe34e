"""Ray plumbing without RL: the runtime, actor groups, health, waits and failures."""
