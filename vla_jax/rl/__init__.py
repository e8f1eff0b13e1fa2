"""Reinforcement learning over the noise that a frozen flow policy starts from."""
