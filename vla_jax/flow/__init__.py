"""Flow matching: the path, the time sampler, the loss and the solver. t = 0 is noise, t = 1 is data, everywhere."""
