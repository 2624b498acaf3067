"""An image classifier of the package's blocks, for routers that a language model cannot use.

Tokens are patches and see each other in both directions. Like `training`, one program trains
all seeds of an arm side by side.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moejax.attention import RMSNorm, Tokens
from moejax.claims.tasks import Images, digit_images
from moejax.claims.training import INIT, WINDOW, arm_file, key_of, read_result
from moejax.config import Config
from moejax.loss import load_balancing_loss, token_losses
from moejax.mesh import single_device_mesh
from moejax.model import Block, LayerRouting
from moejax.optim import make_optimizer

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class ImageArm:
    """One config, trained on the digits with several seeds.

    Attributes:
        name: of its file and of its row in a table.
        config: of the encoder; the layers after the first `moe.first_dense` are MoE. Images a step
            are `train.batch_size`.
        seeds: how many, from 0. A seed decides the order of the images and the first parameters.
    """

    name: str
    config: Config
    seeds: int = 5
    start: None = None
    steps_before: int = 0

    @property
    def key(self) -> str:
        """A hash of all that decides the result."""
        return key_of(self)


class Encoder(nnx.Module):
    """Patches to class logits: a projection, a learned position, blocks, the mean over patches."""

    def __init__(self, config: Config, patches: int, pixels: int, *, rngs: nnx.Rngs):
        model, moe = config.model, config.moe
        mesh, d = single_device_mesh(), model.d_model

        def normal(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) / shape[0] ** 0.5)

        self.embedding = normal(pixels, d)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (patches, d)))
        self.blocks = nnx.List(
            [
                Block(config, mesh, sparse=layer >= moe.first_dense, rngs=rngs)
                for layer in range(model.num_layers)
            ]
        )
        self.norm = RMSNorm(d, "float32")
        self.head = normal(d, CLASSES)

    def __call__(self, patch_btp: jax.Array):
        """Returns logits [B, classes] and the routing sums of every MoE layer."""
        batch, length, _ = patch_btp.shape
        position_bt = jnp.arange(length, dtype=jnp.int32)[None]
        whole_bt = jnp.ones((batch, length), jnp.int32)
        tokens = Tokens(position_bt, whole_bt, whole_bt > 0, causal=False)
        x_btd = patch_btp @ self.embedding[...] + self.position[...][None]
        token_bt = jnp.zeros((batch, length), jnp.int32)
        stats = []
        for number, block in enumerate(self.blocks):
            layer = jnp.asarray(number, jnp.int32)
            x_btd, routed, _ = block(x_btd, tokens, LayerRouting({}, layer, token_bt, None), None)
            stats += [] if routed is None else [routed[0]]
        return self.norm(x_btd).mean(1) @ self.head[...], stats


class Training(NamedTuple):
    """Parameters, optimizer state and key of every seed."""

    params: Any
    opt_state: Any
    key: jax.Array


def run_image_arm(arm: ImageArm, folder: Path) -> dict[str, Any]:
    """Returns an arm's result: the stored one if its key is the same, else it is trained now."""
    file = arm_file(folder, arm)
    stored = read_result(file)
    if stored is not None and stored["key"] == arm.key:
        return stored
    result = train_images(arm, *digit_images())
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def train_images(arm: ImageArm, images: Images, test: Images) -> dict[str, Any]:
    """Trains all seeds of an arm; returns its curve, its accuracy and what it was made of."""
    config = arm.config
    optimizer = make_optimizer(config.optim, config.train.steps)
    _, patches, pixels = images.patch_ntp.shape
    patch_ntp, label_n = jnp.asarray(images.patch_ntp), jnp.asarray(images.label_n)

    def split(key):
        return nnx.split(Encoder(config, patches, pixels, rngs=nnx.Rngs(params=key)))

    graph, _ = split(jax.random.key(0))

    def objective(params, patch_btp, label_b):
        logit_bc, stats = nnx.merge(graph, params)(patch_btp)
        loss = token_losses(logit_bc[:, None], label_b[:, None]).mean()
        weight = config.moe.balance_loss_weight
        balance = sum(load_balancing_loss(s, config.moe) for s in stats) if weight else 0.0
        return loss + weight * balance, loss

    def first(key):
        params = nnx.to_pure_dict(split(jax.random.fold_in(key, INIT))[1])
        return Training(params, optimizer.init(params), key)

    def step(training: Training, number):
        params, opt_state, key = training
        drawn = jax.random.randint(
            jax.random.fold_in(key, number), (config.train.batch_size,), 0, len(label_n)
        )
        grads, loss = jax.grad(objective, has_aux=True)(params, patch_ntp[drawn], label_n[drawn])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return Training(optax.apply_updates(params, updates), opt_state, key), loss

    begin = jax.jit(first)
    starts = [begin(jax.random.key(seed)) for seed in range(arm.seeds)]
    training = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    run = jax.jit(jax.vmap(step, in_axes=(0, None)), donate_argnums=0)
    losses = []
    for number in range(config.train.steps):
        training, loss = run(training, number)
        losses.append(np.asarray(loss))
    test_ntp = jnp.asarray(test.patch_ntp)
    logits = jax.jit(jax.vmap(lambda params: nnx.merge(graph, params)(test_ntp)[0]))
    right_sn = np.asarray(logits(training.params)).argmax(-1) == test.label_n
    return _image_result(arm, np.stack(losses), right_sn.mean(1), training.params)


def _image_result(arm: ImageArm, loss_ns, accuracy_s, params) -> dict[str, Any]:
    starts = range(0, len(loss_ns), WINDOW)
    last = loss_ns[-2 * WINDOW :].mean(0, dtype=np.float64)
    return {
        "key": arm.key,
        "arm": arm.name,
        "steps": len(loss_ns),
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(params)),
        "curve": {
            "step": [min(start + WINDOW, len(loss_ns)) for start in starts],
            "loss": [loss_ns[start : start + WINDOW].mean(0).tolist() for start in starts],
        },
        "evaluations": {
            "as trained": {
                "loss": last.tolist(),
                "accuracy": accuracy_s.tolist(),
                "drop_fraction": [0.0] * arm.seeds,
            }
        },
    }
