"""What a policy's language model still knows: held-out questions about the table, answered greedily."""

import functools

import jax
import numpy as np
from flax import nnx

from vla_jax.data.contract import Contract
from vla_jax.envs.questions import KINDS, Questioner
from vla_jax.evaluation.evaluate import World
from vla_jax.losses.questions import answer_likelihood


def answer_accuracy(
    policy: nnx.Module, contract: Contract, world: World, questions: int = 512, seed: int = 0
) -> dict[str, float]:
    """Share of right answers by kind of question ("answers/where", …), over all ("answers"), and "answer_nll".

    Args:
        policy: any `models.policy.Policy` of the contract, whether it was taught to answer or not.
        world: the scenes that are asked about.
        questions: how many; the same seed asks the same ones, and training with it does not meet them.

    Returns:
        Rates from 0 to 1; "answer_nll" is the mean of -log p(answer | picture, question) in nats a token.
    """
    views, graphdef, weights = policy.config.views, *nnx.split(policy)
    ask = Questioner(contract, world.env, world.bias, world.scene, seed, held_out=True, views=views)
    asked = ask(0, np.arange(questions))
    kind = asked.pop("kind")
    likelihood, right = jax.device_get(_answer(graphdef, weights, asked))
    by_kind = {f"answers/{name}": float(right[kind == number].mean()) for number, name in enumerate(KINDS)}
    return {"answers": float(right.mean()), **by_kind, "answer_nll": float(-likelihood.mean())}


@functools.partial(jax.jit, static_argnums=0)
def _answer(graphdef, weights, questions):
    return answer_likelihood(nnx.merge(graphdef, weights), questions)
