"""Shards to batches, with an exact position in the run."""
