"""Vision encoder, causal trunk, latent queries, action expert, and the policy made of them."""
