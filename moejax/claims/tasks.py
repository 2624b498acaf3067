"""The data of the small experiments: random languages of which the entropy is known, and digits."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError
from moejax.data import Batch


@dataclasses.dataclass(frozen=True)
class MarkovTask:
    """Sequences of several random languages, made as they are needed; no two steps share one.

    The first token names the sequence's domain. Then come two random symbols, and after them
    each symbol is `table[domain, last but one, last]`, or with probability `noise` any symbol with
    equal chance. The loss is taken where the table decides. A model that has read enough knows
    `domains * symbols**2` facts; a small one has to choose, so parameters count.

    With `separators` every symbol is followed by one constant token and the loss is taken there:
    the token that is routed says nothing about what comes next, as a frequent word does.
    With `noise=1` symbols are independent and uniform: no causal model can be below ln(symbols).
    """

    symbols: int = 48
    domains: int = 4
    length: int = 32  # T
    noise: float = 0.1
    separators: bool = False

    @property
    def vocab_size(self) -> int:
        return self.symbols + self.domains + int(self.separators)

    @property
    def entropy(self) -> float:
        """The least loss that a model can have, nats a target."""
        other = self.noise / self.symbols
        likely = 1 - self.noise + other
        rest = (self.symbols - 1) * other * math.log(other) if other else 0.0
        return -likely * math.log(likely) - rest

    def table(self, key: jax.Array) -> jax.Array:
        """Draws the languages: int32 [domains, symbols, symbols]."""
        shape = (self.domains, self.symbols, self.symbols)
        return jax.random.randint(key, shape, 0, self.symbols)

    def batch(self, key: jax.Array, table: jax.Array, size: int) -> Batch:
        """Draws `size` sequences: arrays [size, T]; `domains` holds each sequence's."""
        domain_key, first_key, noise_key, other_key = jax.random.split(key, 4)
        steps = self.length if not self.separators else -(-self.length // 2)
        domain_b = jax.random.randint(domain_key, (size,), 0, self.domains)
        first_2b = jax.random.randint(first_key, (2, size), 0, self.symbols)
        noisy_nb = jax.random.bernoulli(noise_key, self.noise, (steps - 2, size))
        other_nb = jax.random.randint(other_key, (steps - 2, size), 0, self.symbols)

        def following(last_two, drawn):
            a_b, b_b = last_two
            noisy_b, other_b = drawn
            next_b = jnp.where(noisy_b, other_b, table[domain_b, a_b, b_b])
            return (b_b, next_b), next_b

        _, rest_nb = jax.lax.scan(following, (first_2b[0], first_2b[1]), (noisy_nb, other_nb))
        symbol_bn = jnp.concatenate([first_2b, rest_nb]).T
        return self._sequences(domain_b, symbol_bn)

    def _sequences(self, domain_b: jax.Array, symbol_bn: jax.Array) -> Batch:
        size, count = symbol_bn.shape
        # a symbol is decided by the two before it: the third is the first with a loss
        decided_n = jnp.broadcast_to(jnp.arange(count) >= 2, symbol_bn.shape)
        if self.separators:
            constant_bn = jnp.full_like(symbol_bn, self.vocab_size - 1)
            symbol_bn = jnp.stack([symbol_bn, constant_bn], axis=-1).reshape(size, -1)
            decided_n = jnp.stack([decided_n, jnp.zeros_like(decided_n)], -1).reshape(size, -1)
        token_bt = jnp.concatenate([self.symbols + domain_b[:, None], symbol_bn], axis=1)
        window = slice(1, self.length + 1)
        return Batch(
            tokens=token_bt[:, : self.length],
            targets=token_bt[:, window],
            segments=jnp.ones((size, self.length), jnp.int32),
            loss_mask=decided_n[:, : self.length],
            domains=jnp.broadcast_to(domain_b[:, None], (size, self.length)),
        )


class Images(NamedTuple):
    """Images as patches float32 [N, T, pixels], with their class int32 [N]."""

    patch_ntp: np.ndarray
    label_n: np.ndarray


def digit_images(train: int = 1400) -> tuple[Images, Images]:
    """Returns the first `train` and the other ones of 1,797 handwritten digits, 8 x 8 pixels.

    An image is 16 patches of 2 x 2, with values from 0 to 1. The digits come with scikit-learn
    (Alpaydin and Kaynak 1998), so nothing is downloaded.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]  an extra
    except ImportError:
        raise ConfigError(
            "the images of claim C11 come with scikit-learn, which is not installed; pip install "
            "'moejax[claims]', or choose other claims with --only"
        ) from None
    data, target = load_digits(return_X_y=True)
    pixels = np.asarray(data, np.float32).reshape(-1, 4, 2, 4, 2) / 16
    patches = pixels.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    labels = np.asarray(target, np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    patches, labels = patches[order], labels[order]
    return Images(patches[:train], labels[:train]), Images(patches[train:], labels[train:])
