"""Training: state, step, loop, optimiser, checkpoints."""
