"""The blocks that every model is made of."""
