"""The training loop and all that must survive a restart."""
