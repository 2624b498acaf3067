"""The MoE layer: route, assign, dispatch, exchange, experts, combine, inside one `shard_map`.

Inside it every array is one device's part: B is its sequences, E all experts for tokens and E/Z for
weights.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import exchange, reference
from moejax.config import MoEConfig
from moejax.dispatch import (
    capacity_slots,
    capacity_table,
    combine,
    dispatch,
    grouped_rows,
    grouped_slots,
    kept_experts,
)
from moejax.experts import MoEWeights, block_rows, capacity_experts, grouped_experts
from moejax.mesh import AnyMesh, single_device_mesh
from moejax.routing import RouterStats, Routing, route, router_logits, router_stats
from moejax.sharding import BATCH_AXES, parameter_spec, vary_like


class MoE(nnx.Module):
    """A sparse mixture of SwiGLU experts, to be used alone or in a model of one's own.

        moe = MoE(MoEConfig(num_experts=8, top_k=2), d_model=64, rngs=nnx.Rngs(0))
        y_btd, stats = moe(x_btd)

    Args:
        config: routing, capacity and transport.
        d_model: D.
        mesh: where the layer runs; default one device. The axes are those of
            `moejax.mesh.make_mesh`.
        param_dtype: of the experts; the router is always float32.
        rngs: `params` initialises the weights: normal of variance 1/fan-in, the router's a tenth of
            that deviation.
    """

    def __init__(
        self,
        config: MoEConfig,
        d_model: int,
        *,
        mesh: AnyMesh | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.mesh = single_device_mesh() if mesh is None else mesh
        experts, hidden = config.num_experts, config.expert_hidden

        def normal(shape, fan_in, scale=1.0, dtype=param_dtype):
            deviation = scale / fan_in**0.5
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * deviation)

        self.router = normal((d_model, experts), d_model, 0.1, jnp.float32)
        self.gate = normal((experts, d_model, hidden), d_model)
        self.up = normal((experts, d_model, hidden), d_model)
        self.down = normal((experts, hidden, d_model), hidden, output_scale)

    def __call__(
        self,
        x_btd: jax.Array,
        mask_bt: jax.Array | None = None,
        *,
        bias_e: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Returns y [B, T, D] in the dtype of x, and the routing's sums over the whole batch.

        Args:
            x_btd: tokens; B is a multiple of data x fsdp x expert x group_sequences.
            mask_bt: bool; False for padding, which takes no slot and counts nowhere. Default: no
                padding.
            bias_e: float32 [E]; selection bias of the router `sigmoid_bias`.
        """
        if mask_bt is None:
            mask_bt = jnp.ones(x_btd.shape[:2], bool)
        if bias_e is None and self.config.router == "sigmoid_bias":
            bias_e = jnp.zeros(self.config.num_experts, jnp.float32)
        weights = MoEWeights(self.router[...], self.gate[...], self.up[...], self.down[...])
        return apply_moe(weights, x_btd, mask_bt, bias_e, config=self.config, mesh=self.mesh)


def apply_moe(
    weights: MoEWeights,
    x_btd: jax.Array,
    mask_bt: jax.Array,
    bias_e: jax.Array | None,
    *,
    config: MoEConfig,
    mesh: AnyMesh,
) -> tuple[jax.Array, RouterStats]:
    """The layer as a function of its weights; see `MoE.__call__`. Oracle: `reference.apply_moe`."""
    if config.transport == "reference":
        return reference.apply_moe(weights, x_btd, mask_bt, bias_e, config=config)
    specs = MoEWeights._make(
        parameter_spec(f"moe/{n}", w.ndim) for n, w in weights._asdict().items()
    )
    tokens = P(BATCH_AXES)
    run = jax.shard_map(
        functools.partial(_moe_local, config=config),
        mesh=mesh,
        in_specs=(specs, tokens, tokens, P()),
        out_specs=(tokens, P()),
    )
    return run(weights, x_btd, mask_bt, bias_e)


def _moe_local(weights, x_btd, mask_bt, bias_e, *, config: MoEConfig):
    with jax.named_scope("route"):
        router, _ = vary_like(weights.router, x_btd)  # so that its gradient is summed in float32
        logit_bte = router_logits(x_btd, router)
        routing = route(logit_bte, mask_bt, bias_e, config)
    with jax.named_scope("weights"):
        dtype = x_btd.dtype
        # Marked as varying before the gather: gradients are summed over `data` after the
        # reduce-scatter.
        gate, up, down, _ = vary_like(weights.gate, weights.up, weights.down, x_btd)
        weights = weights._replace(
            gate=exchange.gather_weights(gate, 1, dtype),
            up=exchange.gather_weights(up, 1, dtype),
            down=exchange.gather_weights(down, 2, dtype),
        )
    if config.capacity_factor is None:
        kept_bts = routing.expert_ts
        y_btd = _by_gather(weights, x_btd, kept_bts, routing.weight_ts, config)
    else:
        slots = _assign(routing, mask_bt, config)
        group = _group(config)
        kept_gts = kept_experts(group(routing.expert_ts), slots, config.num_experts)
        kept_bts = kept_gts.reshape(routing.expert_ts.shape)
        if config.transport == "gather":
            y_btd = _by_gather(weights, x_btd, kept_bts, routing.weight_ts, config)
        else:
            y_btd = _by_slots(weights, x_btd, routing, slots, config)
    stats = jax.lax.psum(router_stats(routing, kept_bts, mask_bt), BATCH_AXES)
    return exchange.sum_tensor(y_btd), stats


def _group(config: MoEConfig):
    """Returns what groups whole sequences: [B, T, ...] -> [G, tokens of a group, ...]."""
    return lambda x: rearrange(x, "(g n) t ... -> g (n t) ...", n=config.group_sequences)


def _group_tokens(mask_bt, config: MoEConfig) -> int:
    return config.group_sequences * mask_bt.shape[1]


@functools.partial(jax.named_call, name="assign")
def _assign(routing: Routing, mask_bt, config: MoEConfig):
    """Gives each group's assignments their slots; capacity follows real tokens, not padding."""
    assert config.capacity_factor is not None
    group = _group(config)
    table_t = capacity_table(
        _group_tokens(mask_bt, config), config.num_experts, config.top_k, config.capacity_factor
    )
    capacity_g = jnp.asarray(table_t)[group(mask_bt).sum(1)]
    assign = functools.partial(
        capacity_slots,
        num_experts=config.num_experts,
        rows_per_expert=int(table_t[-1]),
        priority=config.priority,
    )
    return jax.vmap(assign)(group(routing.expert_ts), capacity_g)


def _by_slots(weights, x_btd, routing: Routing, slots, config: MoEConfig):
    """Capacity: equal buffers, an all-to-all to the experts and one back."""
    group = _group(config)
    with jax.named_scope("dispatch"):
        buf_grd = jax.vmap(dispatch)(group(x_btd), slots)
        buf_gecd = rearrange(buf_grd, "g (e c) d -> g e c d", e=config.num_experts)
    with jax.named_scope("exchange"):
        buf_ecd = exchange.slots_to_experts(exchange.groups_to_slots(buf_gecd))
    with jax.named_scope("experts"):
        buf_ecd = capacity_experts(buf_ecd, weights.gate, weights.up, weights.down)
    with jax.named_scope("exchange_back"):
        buf_ecd = exchange.slots_to_tokens(buf_ecd)
        out_gecd = exchange.slots_to_groups(buf_ecd, buf_gecd.shape[0])
    with jax.named_scope("combine"):
        out_grd = rearrange(out_gecd, "g e c d -> g (e c) d")
        y_gtd = jax.vmap(combine)(out_grd, group(routing.weight_ts), slots)
    return y_gtd.reshape(x_btd.shape)


def _by_gather(weights, x_btd, expert_bts, weight_bts, config: MoEConfig):
    """Dropless: the expert group's tokens come to every device, which runs its experts on them."""
    flat = functools.partial(rearrange, pattern="b t d -> (b t) d")
    with jax.named_scope("exchange"):
        x_td, expert_ts, weight_ts = jax.tree.map(
            exchange.gather_tokens, (flat(x_btd), flat(expert_bts), flat(weight_bts))
        )
    with jax.named_scope("assign"):
        local = weights.gate.shape[0]
        expert_ts = exchange.local_experts(expert_ts, config.num_experts)
        block = block_rows(expert_ts.size * local // config.num_experts, local)
        rows = grouped_rows(x_td.shape[0], config.top_k, local, block)
        slots = grouped_slots(expert_ts, num_experts=local, rows=rows, align=block)
    with jax.named_scope("dispatch"):
        x_rd = dispatch(x_td, slots)
    with jax.named_scope("experts"):
        out_rd = grouped_experts(
            x_rd, weights.gate, weights.up, weights.down, slots.group_size_e, block
        )
    with jax.named_scope("combine"):
        y_td = combine(out_rd, weight_ts, slots)
    with jax.named_scope("exchange_back"):
        return exchange.scatter_results(y_td).reshape(x_btd.shape)
