"""What a person sees of a running command: progress, metrics, pictures."""
