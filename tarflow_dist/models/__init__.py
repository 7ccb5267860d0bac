"""A model with its files: loading, saving, the hub, its classes, and samples from it."""
