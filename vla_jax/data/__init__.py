"""Demonstrations in, batches out: RLDS datasets, the contract that seals their units, and the Grain loader.

Nothing here imports JAX, so that loader processes start no device.
"""
