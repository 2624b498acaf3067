"""Log-likelihoods and continuations of token ids, many at once, in few compiled shapes.

A request has a row of its own, padded on the right to one of a few widths, and every width has one
number of rows: what is compiled does not depend on the requests. Padding is in no document, so
nothing attends to it and no expert receives it. Routing is dropless, as in evaluation.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.attention import packed_tokens
from moejax.config import Config, ConfigError
from moejax.evaluate import Restored, dropless, with_moe
from moejax.generate import make_generate
from moejax.mesh import mesh_config
from moejax.sharding import place_batch, replicated
from moejax.state import model_graph
from moejax.tokenizer import load_tokenizer

LEAST_WIDTH = 32  # of a row: a narrower one saves little and is one more program
WIDTH_RATIO = 4  # between widths, from `data.sequence_length` down


class Request(NamedTuple):
    """Ids to score, and the ids before them, which may be none: int32 [n] each."""

    context: np.ndarray
    continuation: np.ndarray


class Score(NamedTuple):
    """The log-probability of a continuation, nats, and whether greedy decoding would give it."""

    log_likelihood: float
    greedy: bool


class Sampling(NamedTuple):
    """How to generate; temperature 0 takes the best token each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class _Rows(NamedTuple):
    """Padded requests [B, T]: int32 ids, targets, 1 for a token and 0 for padding; bool: scored."""

    tokens: Any
    targets: Any
    segments: Any
    scored: Any


def make_score(config: Config, mesh: Mesh, known: int):
    """Returns the jitted `(params, router_state, rows [1, B, T]) -> (nats [B], greedy [B])`.

    Args:
        known: ids that the tokenizer has.
    """
    config = with_moe(config, dropless(config.moe))
    graph = model_graph(config, mesh)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def score(params, router_state, rows: _Rows):
        rows = jax.tree.map(lambda leaf: leaf[0], rows)
        model = nnx.merge(graph, params)
        out = model(rows.tokens, packed_tokens(rows.segments), router_state)
        loss_bt = model.token_losses(out.hidden_btd, rows.targets)
        best_bt = model.best_tokens(out.hidden_btd, rows.targets, known)
        nats_b = jnp.where(rows.scored, loss_bt, 0).sum(1)
        return nats_b, (best_bt | ~rows.scored).all(1)

    return score


class Scorer:
    """Scores and continues token ids with the model of a checkpoint.

    A model has no prediction for what stands first in a document, neither in training nor here: the
    first id of a text without context counts as one drawn from the vocabulary, all alike.

    Args:
        config: of the run; `data.sequence_length` is the most tokens that the model sees.
        restored: the checkpoint.
    """

    def __init__(self, config: Config, restored: Restored):
        self._config, self._restored = config, restored
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.max_length = config.data.sequence_length
        self.cut_contexts = 0  # requests so far whose context did not fit and lost its beginning
        self._score = make_score(config, restored.mesh, self.tokenizer.vocab_size)
        self._generate: dict[Sampling, Any] = {}
        sizes = mesh_config(restored.mesh)
        self._unit = sizes.token_shards * config.moe.group_sequences
        self.widths = _widths(self.max_length, sizes.context or 1)

    def _rows(self, width: int) -> int:
        """Returns how many rows of a width make about the tokens of a microbatch."""
        train = self._config.train
        tokens = train.batch_size // train.accumulation * self.max_length
        return -(-max(1, tokens // width) // self._unit) * self._unit

    def _by_width(self, lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Returns batches of indices, each with its width, of rows of these lengths."""
        batches = []
        for low, width in zip((-1, *self.widths), self.widths, strict=False):
            chosen = [i for i, length in enumerate(lengths) if low < length <= width]
            rows = self._rows(width)
            batches += [(width, chosen[at : at + rows]) for at in range(0, len(chosen), rows)]
        return batches

    # Likelihoods

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Returns the score of each request, in their order.

        A context that does not fit before its continuation loses its beginning (`cut_contexts`).

        Raises:
            ConfigError: a continuation alone is too long.
        """
        rows = [self._row(request) for request in requests]
        scores = [Score(0.0, True)] * len(rows)
        for width, batch in self._by_width([len(ids) - 1 for ids, _ in rows]):
            nats, greedy = self._run(width, [rows[i] for i in batch])
            for index, nat, best in zip(batch, nats, greedy, strict=False):
                first = rows[index][1] == 0 and len(rows[index][0]) > 0  # nothing predicts it
                nat = float(nat) + first * math.log(self.tokenizer.vocab_size)
                scores[index] = Score(-nat, bool(best) and not first)
        return scores

    def _row(self, request: Request) -> tuple[np.ndarray, int]:
        """Returns the ids of a row, and how many of the first are context."""
        context, continuation = (np.asarray(part, np.int32) for part in request)
        room = self.max_length + 1 - len(continuation)
        if room < min(1, len(context)):
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens is longer than "
                f"data.sequence_length={self.max_length}, which is all that the model sees; use "
                "shorter ones, or a task of output_type loglikelihood_rolling"
            )
        self.cut_contexts += len(context) > room
        context = context[max(0, len(context) - room) :]
        return np.concatenate([context, continuation]), len(context)

    def _run(self, width: int, rows: list[tuple[np.ndarray, int]]) -> tuple[Any, Any]:
        size = self._rows(width)
        tokens = np.zeros((size, width + 1), np.int32)
        real = np.zeros((size, width + 1), bool)
        scored = np.zeros((size, width + 1), bool)
        for row, (ids, start) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            real[row, : len(ids)] = True
            scored[row, start : len(ids)] = True
        padded = _Rows(tokens[:, :-1], tokens[:, 1:], real[:, 1:].astype(np.int32), scored[:, 1:])
        here = self._restored

        def part(start: int, stop: int) -> _Rows:
            return _Rows(*(array[start:stop] for array in padded))

        batch = place_batch(here.mesh, part, size, 1)
        return jax.device_get(self._score(here.params, here.router_state, batch))

    def score_text(self, texts: Sequence[np.ndarray]) -> list[float]:
        """Returns the log-likelihood of whole texts of any length, each of its ids counted once.

        A text is read in windows of `max_length` predictions that share one id; the last window is
        moved back, so that it is full too. Each text is a document of its own.
        """
        requests, owner = [], []
        for index, ids in enumerate(texts):
            for start, stop in _windows(len(ids), self.max_length):
                begin = max(0, stop - self.max_length - 1)
                requests.append(Request(ids[begin:start], ids[start:stop]))
                owner.append(index)
        totals = [0.0] * len(texts)
        for index, score in zip(owner, self.score(requests), strict=True):
            totals[index] += score.log_likelihood
        return totals

    # Continuations

    def generate(self, contexts: Sequence[np.ndarray], sampling: Sampling) -> list[str]:
        """Returns the continuation of each context, up to the end of the document.

        A context that does not fit loses its beginning (`cut_contexts`).

        Raises:
            ConfigError: a context is empty, or there is no room for one.
        """
        room = self.max_length - sampling.max_tokens
        if room < 1:
            raise ConfigError(
                f"{sampling.max_tokens} new tokens leave no room for a prompt in "
                f"data.sequence_length={self.max_length}; generate fewer (max_gen_toks)"
            )
        for number, ids in enumerate(contexts):
            if len(ids) == 0:
                raise ConfigError(
                    f"prompt {number} is empty; give at least one character to continue"
                )
            self.cut_contexts += len(ids) > room
        contexts = [ids[-room:] for ids in contexts]
        texts = [""] * len(contexts)
        for width, batch in self._by_width([len(ids) for ids in contexts]):
            out_bt = self._continue(width, [contexts[i] for i in batch], sampling)
            for index, row in zip(batch, out_bt, strict=False):
                ends = np.flatnonzero(row == self.tokenizer.end_of_document)
                texts[index] = self.tokenizer.decode(row[: ends[0]] if len(ends) else row)
        return texts

    def _continue(self, width: int, contexts: list[np.ndarray], sampling: Sampling) -> np.ndarray:
        here, size = self._restored, self._rows(width)
        prompt_bt, length_b = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for row, ids in enumerate(contexts):
            prompt_bt[row, : len(ids)] = ids
            length_b[row] = len(ids)
        if sampling not in self._generate:
            self._generate[sampling] = make_generate(
                self._config,
                here.mesh,
                sampling.max_tokens,
                sampling.temperature,
                sampling.top_p,
                self.tokenizer,
            )
        key = jax.random.key(sampling.seed)
        run = self._generate[sampling]
        return np.asarray(run(here.params, here.router_state, prompt_bt, length_b, key))


def _widths(longest: int, multiple: int) -> tuple[int, ...]:
    """Returns the widths of rows, ascending; each is a multiple of the parts of a sequence."""
    widths = [longest]
    while widths[-1] // WIDTH_RATIO >= LEAST_WIDTH:
        widths.append(-(-widths[-1] // WIDTH_RATIO // multiple) * multiple)
    return tuple(sorted(set(widths)))


def _windows(length: int, most: int) -> list[tuple[int, int]]:
    """Returns which ids each window predicts, [start, stop), of a text of `length` ids."""
    starts = [0, *range(most + 1, length, most)]  # nothing predicts the first id
    return list(zip(starts, [*starts[1:], length], strict=True)) if length else []
