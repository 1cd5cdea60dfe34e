"""The day: records experience, and answers questions with it in the prompt."""
