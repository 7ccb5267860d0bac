"""What a run costs, worked out before it starts: memory, time, traffic. Imports no torch."""
