"""Text: chat templates, and every instruction that is sent to a model."""
