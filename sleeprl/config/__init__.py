"""What a night is told: the schema, the loader and the validation. Imports neither torch nor ray."""
