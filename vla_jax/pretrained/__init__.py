"""Key tables that load and save other people's checkpoints."""
