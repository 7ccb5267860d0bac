"""Images, however a user has them, to shards. Knows nothing of models."""
