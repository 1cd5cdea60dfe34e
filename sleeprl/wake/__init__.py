"""The day: recording experience, and answering with it in the prompt."""
