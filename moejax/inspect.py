"""Look inside a checkpoint: what its experts take, what they give, what is lost without them.

All of it is dropless, as evaluation is, on the validation text. Sums are taken on the devices, a
batch at a time; what is counted by token comes to the host, and memory does not grow with the text.
"""

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.atlas import PARTS, SNIPPETS, Atlas, Snippet, TokenView, save_atlas
from moejax.atlas_show import (
    agreement_json,
    atlas_json,
    plot_view,
    show_agreement,
    show_atlas,
    show_view,
    view_json,
)
from moejax.attention import packed_tokens
from moejax.config import Config
from moejax.corpus import Corpus, load_corpus
from moejax.data import Batch, ValidationBatches, check_vocabulary
from moejax.errors import require
from moejax.evaluate import dropless, restore_for_use, with_moe
from moejax.mesh import Device, mesh_config
from moejax.moe_config import ALL_EXPERTS, NOT_CAUSAL
from moejax.routing import KEEP, Inspected
from moejax.sharding import place_batch, replicated
from moejax.state import model_graph
from moejax.tallies import (
    Agreement,
    TokenCounts,
    agreement,
    experts_to_remove,
    information,
    same_choices,
)
from moejax.tokenizer import Tokenizer, load_tokenizer
from moejax.workdir import atlas_file, checkpoint_steps

log = logging.getLogger("moejax")

REMOVED = 64  # experts that are taken out, unless more are asked for
REMOVAL_TOKENS = 1 << 14  # over which what is lost without an expert is measured
AGREEMENT_TOKENS = 1 << 16  # over which two checkpoints are compared
EARLIER = 8  # checkpoints that the atlas looks back to
VIEWS, VIEW_TOKENS = 8, 192  # texts of the atlas that are shown token by token, and their length
BEFORE_TOKENS, AFTER_TOKENS = 64, 32  # of a snippet, which is cut to ...
BEFORE, AFTER = 60, 40  # ... these characters around its token


class Page(NamedTuple):
    """Rows of validation text, arrays [B, T].

    domain, part: int32; of the token itself: its domain, and the tenth of its document.
    """

    batch: Batch
    domain: Any
    part: Any


class Sums(NamedTuple):
    """What the tokens of a batch did, as sums; see `Atlas` for each."""

    load_dle: Any
    load_ple: Any
    coactivation_lee: Any
    norm_le: Any


class Seen(NamedTuple):
    """Choices and losses of a batch.

    expert_albts: int32 [A, L, B, T, K]; E for none.
    loss_abt: float32; nats of each target.
    """

    expert_albts: Any
    loss_abt: Any


def experts_by_layer(config: Config) -> np.ndarray:
    """Returns int [L]: what a token chooses from in each MoE layer."""
    counts = [[stack.config.choices] * stack.num_layers for stack, _ in config.moe_stacks()]
    return np.array(list(itertools.chain(*counts)), np.int32)


def layer_numbers(config: Config) -> np.ndarray:
    """Returns int [L]: which layers of the model are MoE layers."""
    every = config.moe.every or 1
    return config.moe.first_dense + every * (np.arange(config.num_moe_layers) + 1) - 1


def _choices(seen: Inspected, config: Config) -> Inspected:
    """Returns the choices that count, E of the largest layer for none.

    Router `dense` takes every expert for every token: a token counts at that of the largest weight.
    """
    count_l111 = jnp.asarray(experts_by_layer(config))[:, None, None, None]
    experts = config.moe.choices
    seen = seen._replace(
        expert_bts=jnp.where(seen.expert_bts < count_l111, seen.expert_bts, experts)
    )
    if config.moe.router != "dense":
        return seen
    best = jnp.argmax(seen.weight_bts, axis=-1)[..., None]
    return Inspected(*(jnp.take_along_axis(leaf, best, axis=-1) for leaf in seen))


def _layer_sums(seen: Inspected, domain_btd, part_btp, experts: int) -> Sums:
    """Returns the sums of one layer. Counts are exact: float32 holds whole numbers to 2^24."""

    def add(sums, choice):
        expert_bt, norm_bt = choice
        here_bte = jax.nn.one_hot(expert_bt, experts, dtype=jnp.float32)
        taken_bte, norm_e = sums
        return (taken_bte + here_bte, norm_e + (norm_bt[..., None] * here_bte).sum((0, 1))), None

    columns = (jnp.moveaxis(seen.expert_bts, -1, 0), jnp.moveaxis(seen.norm_bts, -1, 0))
    zeros = (jnp.zeros((*domain_btd.shape[:2], experts)), jnp.zeros(experts))
    (taken_bte, norm_e), _ = jax.lax.scan(add, zeros, columns)

    def count(letters: str, other) -> jax.Array:
        return jnp.einsum(letters, taken_bte, other).astype(jnp.int32)

    return Sums(
        count("bte,btd->de", domain_btd),
        count("bte,btp->pe", part_btp),
        count("bte,btf->ef", taken_bte),
        norm_e,
    )


def _functions(config: Config, mesh: Mesh, num_domains: int) -> tuple[Callable, Callable, Callable]:
    """Returns three jitted functions of (params, router_state, keep_le, pages [A, B, T]).

    The first gives (`Sums`, int16 choices [A, L, B, T, K]), the second `Seen`, the third all that
    is seen of a text, `Inspected` with leaves [A, L, B, T, K], and losses. An expert whose entry in
    keep_le is 0 is left out.
    """
    graph = model_graph(config, mesh)
    experts = config.moe.choices

    def forward(batch: Batch, params, router_state, keep_le):
        model = nnx.merge(graph, params)
        state = router_state | {KEEP: keep_le}
        out = model(batch.tokens, packed_tokens(batch.segments), state)
        assert out.inspected is not None
        return model, out.hidden_btd, _choices(out.inspected, config)

    def by_microbatch(one: Callable):
        @partial(jax.jit, out_shardings=replicated(mesh))
        def run(params, router_state, keep_le, pages: Page):
            return jax.lax.map(lambda page: one(page, params, router_state, keep_le), pages)

        return run

    def sums(page: Page, *weights):
        _, _, seen = forward(page.batch, *weights)
        domain_btd = jax.nn.one_hot(page.domain, num_domains, dtype=jnp.float32)
        part_btp = jax.nn.one_hot(page.part, PARTS, dtype=jnp.float32)
        by_layer = jax.lax.map(
            lambda layer: _layer_sums(layer, domain_btd, part_btp, experts), seen
        )
        return by_layer, seen.expert_bts.astype(jnp.int16)

    def losses(page: Page, *weights):
        model, hidden_btd, seen = forward(page.batch, *weights)
        loss_bt = model.token_losses(hidden_btd, page.batch.targets)
        return Seen(seen.expert_bts.astype(jnp.int16), loss_bt)

    def text(page: Page, *weights):
        model, hidden_btd, seen = forward(page.batch, *weights)
        return seen, model.token_losses(hidden_btd, page.batch.targets)

    return by_microbatch(sums), by_microbatch(losses), by_microbatch(text)


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
        self._sums, self._losses, self._text = _functions(config, mesh, len(self.corpus.domains))

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


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns how to show one token: its text, or a name in angle brackets where it has none."""
    if token == tokenizer.end_of_document:
        return "<end of document>"
    text = tokenizer.decode([token])
    if text in ("", "\ufffd"):
        return f"<0x{token:02X}>" if tokenizer.bytes_v[token] == 1 and token < 256 else f"<{token}>"
    return text


def pieces(tokenizer: Tokenizer, token_t: np.ndarray) -> tuple[str, ...]:
    """Returns the part of the text that each token adds; together they are the text.

    Of a character that takes several tokens the first has it, and the others have nothing.
    """
    whole = tokenizer.decode(token_t)
    lengths = [len(tokenizer.decode(token_t[:stop])) for stop in range(1, len(token_t))]
    ends = np.minimum(np.maximum.accumulate([0, *lengths, len(whole)]), len(whole))
    ends[-1] = len(whole)
    return tuple(whole[a:b] for a, b in itertools.pairwise(ends))


def context(tokenizer: Tokenizer, token_t: np.ndarray, at: int) -> tuple[str, int, int]:
    """Returns a text around token `at`, and where in it the token begins and ends."""
    whole, before = tokenizer.decode(token_t), tokenizer.decode(token_t[:at])
    start, end = len(before), len(tokenizer.decode(token_t[: at + 1]))
    if token_t[at] == tokenizer.end_of_document:
        whole = before + token_text(tokenizer, int(token_t[at]))
        end = len(whole)
    elif end <= start:  # a further byte of one character
        start = max(0, end - 1)
    first = max(0, start - BEFORE)
    return whole[first : end + AFTER], start - first, end - first


# Workdirs


def atlas_of_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    remove: int = REMOVED,
    devices: list[Device] | None = None,
) -> Atlas:
    """Returns the atlas of a checkpoint, and writes it into the workdir.

    It looks back to at most `EARLIER` of the checkpoints before it, the latest ones.

    Args:
        step: None for the last one.
        devices: default: all.

    Raises:
        ConfigError: no such checkpoint, no expert, or the mesh does not fit.
    """
    restored = restore_for_use(config, workdir, step, devices)
    inspector = Inspector(config, restored.mesh)
    steps = [s for s in checkpoint_steps(workdir, config.checkpoint.local) if s < restored.step]

    def earlier():
        for one in steps[-EARLIER:]:
            log.info("inspect: comparing with the checkpoint of step %d", one)
            before = restore_for_use(config, workdir, one, devices)
            yield one, before.params, before.router_state

    atlas = inspector.atlas(
        restored.step, restored.params, restored.router_state, remove=remove, earlier=earlier()
    )
    if jax.process_index() == 0:
        save_atlas(atlas, atlas_file(workdir, restored.step))
    return atlas


def views_of_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    texts: Sequence[str],
    devices: list[Device] | None = None,
) -> tuple[int, list[TokenView]]:
    """Returns a checkpoint's step and what it does with each text; see `Inspector.view`."""
    restored = restore_for_use(config, workdir, step, devices)
    inspector = Inspector(config, restored.mesh)
    model = restored.params, restored.router_state
    encode = inspector.tokenizer.encode
    return restored.step, [inspector.view(*model, encode(text), text[:60]) for text in texts]


class Compared(NamedTuple):
    """The agreement of two checkpoints, the first and the second."""

    steps: tuple[int, int]
    tokens: int
    layers_l: np.ndarray
    agreement: Agreement


def agreement_of_workdirs(
    config: Config,
    workdir: Path,
    step: int | None,
    other_config: Config,
    other: Path,
    other_step: int | None,
    devices: list[Device] | None = None,
) -> Compared:
    """Compares how two checkpoints route the validation text of the first.

    Raises:
        ConfigError: they differ in tokenizer or in the number of MoE layers.
    """
    fingerprints = [load_tokenizer(c.data.tokenizer).fingerprint for c in (config, other_config)]
    require(
        fingerprints[0] == fingerprints[1],
        f"{workdir} has data.tokenizer={config.data.tokenizer!r} and {other} "
        f"{other_config.data.tokenizer!r}: they do not see the same tokens; compare runs of one "
        "tokenizer",
    )
    require(
        config.num_moe_layers == other_config.num_moe_layers,
        f"{workdir} has {config.num_moe_layers} MoE layers and {other} "
        f"{other_config.num_moe_layers}; routing is compared layer by layer, give runs with as "
        "many",
    )
    experts = max(config.moe.choices, other_config.moe.choices)
    corpus = load_corpus(config.data, "validation")
    steps, found = [], []
    for one, folder, at in ((config, workdir, step), (other_config, other, other_step)):
        # the text of the first, in its batches: the same tokens in the same order
        one = dataclasses.replace(one, data=config.data, eval=config.eval, mesh=config.mesh)
        one = dataclasses.replace(one, train=config.train)
        restored = restore_for_use(one, folder, at, devices)
        inspector = Inspector(one, restored.mesh, corpus)
        choices = inspector.choices(restored.params, restored.router_state)
        found.append(np.where(choices < one.moe.choices, choices, experts))
        steps.append(restored.step)
    a, b = found
    return Compared(
        (steps[0], steps[1]), a.shape[1], layer_numbers(config), agreement(a, b, experts)
    )


def inspect_workdir(config: Config, other: Config | None, options: argparse.Namespace) -> None:
    """Does what a line of `moejax inspect` asks for, and shows it.

    Args:
        other: config of `options.against`.
    """
    workdir, layers_l = Path(options.workdir), layer_numbers(config)
    if options.text is not None:
        step, (view,) = views_of_workdir(config, workdir, options.step, [options.text])
        show_view(step, view, layers_l)
        result = view_json(step, view, layers_l)
        if options.png:
            plot_view(view, layers_l, options.png)
    elif other is not None:
        compared = agreement_of_workdirs(
            config, workdir, options.step, other, Path(options.against), options.against_step
        )
        show_agreement(*compared)
        result = agreement_json(*compared)
    else:
        remove = REMOVED if options.remove is None else options.remove
        atlas = atlas_of_workdir(config, workdir, options.step, remove)
        show_atlas(atlas)
        print(f"wrote {atlas_file(workdir, atlas.step)}")
        result = atlas_json(atlas)
    if options.json:
        options.json.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
