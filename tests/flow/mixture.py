"""A flow whose law is known: chunks of one number, drawn from a mixture of Gaussians of one deviation."""

import jax
import jax.numpy as jnp
import numpy as np


def mixture_field(means, weights, deviation):
    """The exact field E[data - noise | x_t] of chunks of width 1 whose one number is drawn from a Gaussian mixture."""

    def field(x, t):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        log = jnp.log(weights) - (x - t * means) ** 2 / (2 * variance)
        data = means + t * deviation**2 / variance * (x - t * means)
        noise = (1 - t) / variance * (x - t * means)
        return (jax.nn.softmax(log, -1) * (data - noise)).sum(-1, keepdims=True)

    return field


def mixture_twist(means, weights, deviation, slope):
    """log E[exp(slope x_1) | x_t] of the same mixture, as a reward (x [*B, 1, 1], t) -> [*B]."""

    def reward(x, t):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        log = jax.nn.log_softmax(jnp.log(weights) - (x - t * means) ** 2 / (2 * variance), -1)
        mean = means + t * deviation**2 / variance * (x - t * means)
        spread = deviation**2 * (1 - t) ** 2 / variance
        return jax.nn.logsumexp(log + slope * mean + slope**2 * spread / 2, -1)[..., 0]

    return reward


def tilted(means, weights, deviation, slope):
    """Means and weights of p(x) exp(slope x), a mixture of the same deviation."""
    log = np.log(weights) + slope * means
    return means + slope * deviation**2, np.exp(log) / np.exp(log).sum()


def assert_mixture(x, means, weights, deviation, tolerance):
    """The samples x have the mixture's distribution function at all its quantiles, to within `tolerance`."""
    from scipy.stats import norm

    x = np.sort(np.ravel(x))
    exact = (weights * norm.cdf(x[:, None], means, deviation)).sum(-1)
    gap = np.abs(exact - (np.arange(x.size) + 0.5) / x.size).max()
    assert gap < tolerance, f"the largest gap of distribution functions is {gap:.3f}"
