"""Text: chat templates to token ids, and every instruction sent to a model."""
