"""Look inside a checkpoint: what its experts take, what they give, what is lost without them.

All of it is dropless, as evaluation is, on the validation text. Sums are taken on the devices, a
batch at a time; what is counted by token comes to the host, and memory does not grow with the text.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.atlas import PARTS, SNIPPETS, Atlas, Snippet, TokenView
from moejax.config import Config
from moejax.corpus import Corpus, load_corpus
from moejax.data import Batch, ValidationBatches, check_vocabulary
from moejax.errors import require
from moejax.evaluate import dropless, with_moe
from moejax.inspect_step import Page, Sums, experts_by_layer, make_inspect_steps
from moejax.mesh import mesh_config
from moejax.moe_config import ALL_EXPERTS, NOT_CAUSAL
from moejax.sharding import place_batch
from moejax.tallies import TokenCounts, experts_to_remove, information, same_choices
from moejax.token_text import context, pieces, token_text
from moejax.tokenizer import load_tokenizer

log = logging.getLogger("moejax")

REMOVED = 64  # experts that are taken out, unless more are asked for
REMOVAL_TOKENS = 1 << 14  # over which what is lost without an expert is measured
AGREEMENT_TOKENS = 1 << 16  # over which two checkpoints are compared
VIEWS, VIEW_TOKENS = 8, 192  # texts of the atlas that are shown token by token, and their length
BEFORE_TOKENS, AFTER_TOKENS = 64, 32  # around the token of a snippet


def layer_numbers(config: Config) -> np.ndarray:
    """Returns int [L]: which layers of the model are MoE layers."""
    every = config.moe.every or 1
    return config.moe.first_dense + every * (np.arange(config.num_moe_layers) + 1) - 1


class Inspector:
    """Looks into models of one config on its validation text.

    Args:
        config: of the run; `eval.batches` says how much text.
        mesh: where to run.
        corpus: the text; default: the validation split of `config.data`.

    Raises:
        ConfigError: the model has no experts, or the tokenizer has ids that it lacks.
    """

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus | None = None):
        require(
            config.num_moe_layers > 0,
            "the model has no MoE layer and so no expert to look at (moe.every="
            f"{config.moe.every}); give the workdir of a run that has one",
        )
        self.config = config = with_moe(config, dropless(config.moe))
        self.mesh = mesh
        self.corpus = load_corpus(config.data, "validation") if corpus is None else corpus
        check_vocabulary(self.corpus, config.model.vocab_size)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.experts_l = experts_by_layer(config)
        self._batches = ValidationBatches(
            self.corpus, config.data.sequence_length, config.train.batch_size, config.eval.batches
        )
        train = config.train
        unit = mesh_config(mesh).token_shards * config.moe.group_sequences
        self._rows = -(-train.batch_size // train.accumulation // unit) * unit * train.accumulation
        self._sums, self._losses, self._text = make_inspect_steps(
            config, mesh, len(self.corpus.domains)
        )

    # Text

    def _page(self, index: int, start: int, stop: int) -> Page:
        position_bt = self._positions(index, start, stop)
        document_bt = np.searchsorted(self.corpus.start_d, position_bt, side="right") - 1
        first_bt, last_bt = self.corpus.start_d[document_bt], self.corpus.start_d[document_bt + 1]
        part_bt = (position_bt - first_bt) * PARTS // (last_bt - first_bt)
        domain_bt = self.corpus.domain_d[document_bt]
        batch = self._batches.rows(index, start, stop)
        return Page(batch, domain_bt.astype(np.int32), part_bt.astype(np.int32))

    def _positions(self, index: int, start: int, stop: int) -> np.ndarray:
        """Returns int64 [B, T]: which token of the split each is; anything under padding."""
        firsts = (self._batches.first_token(index, row) for row in range(start, stop))
        first_b1 = np.array([first or 0 for first in firsts], np.int64)[:, None]
        position_bt = first_b1 + np.arange(self.config.data.sequence_length)
        return np.minimum(position_bt, self.corpus.num_tokens - 1)

    def _place(self, index: int) -> Page:
        rows = partial(self._page, index)
        return place_batch(self.mesh, rows, self._rows, self.config.train.accumulation)

    def _spread(self, tokens: int) -> range:
        """Returns batches, evenly spread over the text, that have about `tokens` tokens."""
        size = self.config.train.batch_size * self.config.data.sequence_length
        every = -(-len(self._batches) * size // max(tokens, size))
        return range(0, len(self._batches), every)

    def _flat(self, expert_albts: jax.Array) -> np.ndarray:
        """Returns the choices of a batch [L, rows * T, K], in the order of its rows."""
        expert_labts = np.asarray(expert_albts).swapaxes(0, 1)
        return expert_labts.reshape(len(expert_labts), -1, expert_labts.shape[-1])

    def _keep(self, without: tuple[int, int] | None = None) -> np.ndarray:
        keep_le = np.ones((len(self.experts_l), self.config.moe.choices), np.float32)
        if without is not None:
            keep_le[without] = 0
        return keep_le

    # What is measured

    def choices(self, params: Any, router_state: dict[str, jax.Array]) -> np.ndarray:
        """Returns the experts of about `AGREEMENT_TOKENS` tokens, int16 [L, N, K]; E for none."""
        found = []
        for index in self._spread(AGREEMENT_TOKENS):
            real_n = self._page(index, 0, self._rows).batch.segments.reshape(-1) > 0
            seen = self._losses(params, router_state, self._keep(), self._place(index))
            found.append(_narrow(self._flat(seen.expert_albts)[:, real_n], self.config.moe.choices))
        width = max(part.shape[-1] for part in found)
        return np.concatenate([_widen(p, width, self.config.moe.choices) for p in found], axis=1)

    def removals(
        self, params: Any, router_state: dict[str, jax.Array], pairs: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        """Returns what losses rise by, nats, when an expert is left out: float64 [3, L, E].

        Means over all tokens, over those that take the expert, and over the others; NaN for an
        expert that is not in `pairs`, and where there is no such token. A token counts by the loss
        of the one after it.
        """
        sums = np.zeros((3, *self._keep().shape))
        counts = np.zeros_like(sums)
        for index in self._spread(REMOVAL_TOKENS) if pairs else ():
            pages = self._place(index)
            mask_n = self._page(index, 0, self._rows).batch.loss_mask.reshape(-1)
            whole = self._losses(params, router_state, self._keep(), pages)
            expert_lns, loss_n = self._flat(whole.expert_albts), _host(whole.loss_abt)
            for layer, expert in pairs:
                keep_le = self._keep((layer, expert))
                rest = self._losses(params, router_state, keep_le, pages)
                rise_n = np.where(mask_n, _host(rest.loss_abt) - loss_n, 0)
                own_n = mask_n & (expert_lns[layer] == expert).any(-1)
                of_whom = (mask_n, own_n, mask_n & ~own_n)
                sums[:, layer, expert] += [rise_n[who].sum() for who in of_whom]
                counts[:, layer, expert] += [who.sum() for who in of_whom]
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def view(
        self, params: Any, router_state: dict[str, jax.Array], token_t: np.ndarray, name: str
    ) -> TokenView:
        """Returns what the layers do with one text, alone in its sequence.

        Raises:
            ConfigError: it is empty, or longer than the sequences of the training.
        """
        length = self.config.data.sequence_length
        require(len(token_t) > 0, f"the text {name!r} has no token; give at least one character")
        require(
            len(token_t) <= length,
            f"the text {name!r} has {len(token_t)} tokens and the model was trained with "
            f"data.sequence_length={length}; give a shorter one",
        )
        token_bt = np.zeros((self._rows, length), np.int32)
        token_bt[0, : len(token_t)] = token_t
        segment_bt = np.zeros_like(token_bt)
        segment_bt[0, : len(token_t)] = 1
        target_bt = np.roll(token_bt, -1, axis=1)
        batch = Batch(token_bt, target_bt, segment_bt, segment_bt > 0, np.zeros_like(token_bt))
        page = Page(batch, batch.domains, batch.domains)
        pages = place_batch(
            self.mesh,
            lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], page),
            self._rows,
            self.config.train.accumulation,
        )
        seen, loss_abt = self._text(params, router_state, self._keep(), pages)
        expert_lts, weight_lts, _ = (np.asarray(v)[0, :, 0, : len(token_t)] for v in seen)
        loss_t = np.asarray(loss_abt)[0, 0, : len(token_t)]
        loss_t = np.concatenate([[np.nan], loss_t[:-1]]).astype(np.float32)
        expert_ltk, weight_ltk = _by_weight(expert_lts, weight_lts, self.config.moe.choices)
        return TokenView(name, pieces(self.tokenizer, token_t), expert_ltk, weight_ltk, loss_t)

    def atlas(
        self,
        step: int,
        params: Any,
        router_state: dict[str, jax.Array],
        *,
        remove: int = REMOVED,
        earlier: Iterable[tuple[int, Any, dict[str, jax.Array]]] = (),
    ) -> Atlas:
        """Returns the atlas of one checkpoint.

        Args:
            remove: how many experts to leave out, one at a time, to see what is lost.
            earlier: (step, params, router_state) of earlier checkpoints.
        """
        sums, counts, tokens = self._counted(params, router_state)
        load_le = sums.load_dle.sum(0)
        pairs = experts_to_remove(load_le, self.experts_l, remove)
        log.info("inspect: leaving out %d of %d experts", len(pairs), self.experts_l.sum())
        removed, own, other = self.removals(params, router_state, pairs).astype(np.float32)
        top_ids, lift, count, place = counts.top(load_le)
        steps, same_sl = self._saturation(params, router_state, earlier)
        ids = np.unique(top_ids[top_ids >= 0])
        return Atlas(
            step=step,
            layers_l=layer_numbers(self.config),
            experts_l=self.experts_l,
            domains=self.corpus.domains,
            tokens=tokens,
            load_dle=sums.load_dle,
            load_ple=sums.load_ple,
            coactivation_lee=sums.coactivation_lee,
            information_l=np.array([information(c) for c in sums.load_dle.swapaxes(0, 1)]),
            norm_le=_mean(sums.norm_le, load_le),
            removed_le=removed,
            removed_own_le=own,
            removed_other_le=other,
            top_token_lew=top_ids,
            top_lift_lew=lift,
            top_count_lew=count,
            text_ids_n=ids,
            top_text=tuple(token_text(self.tokenizer, int(token)) for token in ids),
            snippets=tuple(self._snippets(place)),
            saturation_steps=steps,
            saturation_sl=same_sl,
            views=tuple(self._views(params, router_state)),
            notes=tuple(_notes(self.config, len(pairs), int(self.experts_l.sum()))),
        )

    def _counted(self, params, router_state) -> tuple[Sums, TokenCounts, int]:
        """Returns sums, counts by token, and how many tokens there were, of the whole text."""
        vocab, (layers, experts) = self.config.model.vocab_size, self._keep().shape
        counts = TokenCounts(self._frequency(vocab), layers, experts)
        total, tokens = None, 0
        for index in range(len(self._batches)):
            pages = self._place(index)
            by_part, expert_albts = self._sums(params, router_state, self._keep(), pages)
            sums = Sums(*(_wide(leaf).sum(0) for leaf in by_part))
            total = sums if total is None else Sums(*map(np.add, total, sums))
            batch = self._page(index, 0, self._rows).batch
            place_n = self._positions(index, 0, self._rows).reshape(-1)
            counts.add(batch.tokens.reshape(-1), place_n, self._flat(expert_albts))
            tokens += int((batch.segments > 0).sum())
        assert total is not None  # a split has a sequence
        # [L, D, E] of `lax.map` over layers
        loads = (total.load_dle.swapaxes(0, 1), total.load_ple.swapaxes(0, 1))
        return total._replace(load_dle=loads[0], load_ple=loads[1]), counts, tokens

    def _frequency(self, vocab: int) -> np.ndarray:
        frequency_v = np.zeros(vocab, np.int64)
        for index in range(len(self._batches)):
            batch = self._batches.rows(index)
            frequency_v += np.bincount(batch.tokens[batch.segments > 0], minlength=vocab)
        return frequency_v

    def _saturation(self, params, router_state, earlier) -> tuple[np.ndarray, np.ndarray]:
        steps, rows, final = [], [], None
        for step, *model in earlier:
            final = self.choices(params, router_state) if final is None else final
            steps.append(step)
            rows.append(same_choices(self.choices(*model), final, self.config.moe.choices))
        same_sl = np.array(rows, np.float32).reshape(len(steps), len(self.experts_l))
        return np.array(steps, np.int64), same_sl

    def _snippets(self, place_lew: np.ndarray) -> Iterable[Snippet]:
        start_d = self.corpus.start_d
        for layer, expert in np.ndindex(place_lew.shape[:2]):
            for place in place_lew[layer, expert, :SNIPPETS]:
                if place < 0:
                    continue
                document = int(np.searchsorted(start_d, place, side="right")) - 1
                first = max(int(start_d[document]), int(place) - BEFORE_TOKENS)
                last = min(int(start_d[document + 1]), int(place) + AFTER_TOKENS)
                ids = np.asarray(self.corpus.token_n[first:last])
                text = context(self.tokenizer, ids, int(place) - first)
                yield Snippet(layer, expert, *text)

    def _views(self, params, router_state) -> Iterable[TokenView]:
        """Shows how the first document of each domain begins."""
        domains, first = np.unique(self.corpus.domain_d, return_index=True)
        for domain, document in list(zip(domains, first, strict=True))[:VIEWS]:
            start, stop = (int(bound) for bound in self.corpus.start_d[document : document + 2])
            stop = min(stop, start + VIEW_TOKENS, start + self.config.data.sequence_length)
            ids = np.asarray(self.corpus.token_n[start:stop])
            yield self.view(params, router_state, ids, self.corpus.domains[domain])


def _host(loss_abt: jax.Array) -> np.ndarray:
    return np.asarray(loss_abt).astype(np.float64).reshape(-1)


def _wide(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf).astype(
        np.int64 if np.issubdtype(leaf.dtype, np.integer) else np.float64
    )


def _mean(sum_le: np.ndarray, count_le: np.ndarray) -> np.ndarray:
    return np.where(count_le > 0, sum_le / np.maximum(count_le, 1), np.nan).astype(np.float32)


def _narrow(expert_lns: np.ndarray, none: int) -> np.ndarray:
    """Returns the choices without columns that nobody needs: a router may have one an expert."""
    sorted_lns = np.sort(expert_lns, axis=-1)
    return sorted_lns[..., : max(1, int((sorted_lns < none).sum(-1).max(initial=0)))]


def _widen(expert_lns: np.ndarray, width: int, none: int) -> np.ndarray:
    behind = [(0, 0), (0, 0), (0, width - expert_lns.shape[-1])]
    return np.pad(expert_lns, behind, constant_values=none)


def _by_weight(
    expert_lts: np.ndarray, weight_lts: np.ndarray, none: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns experts [L, T, K], -1 for none, and weights, the largest first; K is the most."""
    real = expert_lts < none
    order = np.argsort(np.where(real, -weight_lts, np.inf), axis=-1, kind="stable")
    order = order[..., : max(1, int(real.sum(-1).max(initial=0)))]
    real = np.take_along_axis(real, order, axis=-1)
    expert = np.where(real, np.take_along_axis(expert_lts, order, axis=-1), -1)
    weight = np.where(real, np.take_along_axis(weight_lts, order, axis=-1), 0)
    return expert.astype(np.int16), weight.astype(np.float32)


def _notes(config: Config, removed: int, experts: int) -> Iterable[str]:
    """Says what of the atlas the router does not define, or was not measured."""
    router = config.moe.router
    if removed < experts:
        yield (
            f"{removed} of {experts} experts were left out to see what is lost: those that carry "
            "the most and a sample of the others; --remove N takes more."
        )
    if router == "soft":
        yield (
            "Router soft mixes all tokens into every expert: a token counts at the expert of the "
            "largest mass, and the norm of what an expert gives to one token is not defined."
        )
    if router == "dense":
        yield "Router dense gives every token to every expert: it counts at that of most weight."
    if router in ALL_EXPERTS and router != "dense":
        yield (
            f"Router {router} gives every token to every expert with the same weight: load, "
            "co-activation, information and tokens say nothing of an expert, its norm and what is "
            "lost without it do."
        )
    if router in NOT_CAUSAL:
        yield (
            f"Router {router} chooses by the other tokens of the text too: {NOT_CAUSAL[router]}; "
            "the same token in another text may go elsewhere."
        )
    if config.moe.free_experts:
        yield (
            f"Choices from number {config.moe.num_experts} on are experts without a network: "
            f"{config.moe.zero_experts} zero, {config.moe.copy_experts} copy, "
            f"{config.moe.constant_experts} constant."
        )
