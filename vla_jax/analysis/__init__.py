"""What notebooks call: load runs, compare them, draw."""
