"""What is seen of a layer: against the oracle, on several meshes, and counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import moe, reference
from moejax.inspect_step import counted_choices, layer_sums
from moejax.moe_config import MoEConfig
from moejax.overrides import load_config
from moejax.parameters import moe_parameters
from moejax.router_state import initial_router_state
from moejax.routing import KEEP, Inspected, RouterInputs

B, T, D, F, E = 8, 6, 8, 8, 8
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
MASK_BT = np.arange(T) < np.array([6, 6, 3, 6, 0, 6, 6, 5])[:, None]
KEEP_E = np.where(np.arange(E) == 3, 0, 1).astype(np.float32)


def _moe(**changes) -> MoEConfig:
    base = {"num_experts": E, "top_k": 2, "expert_hidden": F, "capacity_factor": None}
    return MoEConfig(**{**base, **changes})


CONFIGS = {
    "top 2": _moe(),
    "capacity": _moe(capacity_factor=0.5),
    "free": _moe(num_experts=4, zero_experts=1, copy_experts=1, constant_experts=2),
    "relu": _moe(router="relu", top_k=2),
    "soft": _moe(router="soft", top_k=2, allow_noncausal=True),
}


def _weights(config: MoEConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    table = moe_parameters(config, D)
    return {n: random.normal(size=p.shape).astype(np.float32) for n, p in table.items()}


def _look(apply, config, weights, keep_e, mesh=None):
    state = {n: v[0] for n, v in initial_router_state(config, 1, 9, None).items()}
    if keep_e is not None:
        state[KEEP] = jnp.asarray(keep_e[: config.choices])

    @jax.jit
    def run(weights):
        return apply(weights, X_BTD, RouterInputs(MASK_BT), state, config=config, mesh=mesh)

    y_btd, _, seen = run(weights)
    return np.asarray(y_btd), seen


@pytest.mark.parametrize(
    "name",
    ["free", "soft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("relu", "capacity"))],
)
def test_what_is_seen_is_what_the_oracle_sees(mesh_of, name):
    config = CONFIGS[name]
    weights = _weights(config)
    expected_btd, expected = _look(reference.apply_moe, config, weights, KEEP_E)
    y_btd, seen = _look(moe.apply_moe, config, weights, KEEP_E, mesh_of(1, 2, 2, 2))
    np.testing.assert_allclose(y_btd, expected_btd, atol=2e-5 * np.abs(expected_btd).max())
    np.testing.assert_array_equal(seen.expert_bts, expected.expert_bts)
    np.testing.assert_allclose(seen.weight_bts, expected.weight_bts, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.norm_bts, expected.norm_bts, rtol=1e-4, atol=1e-4)
    if name != "soft":
        assert (np.asarray(expected.norm_bts) > 0).any()
        assert (np.asarray(expected.weight_bts)[np.asarray(expected.expert_bts) == 3] == 0).all()


@pytest.mark.parametrize("name", ["top 2", "relu", "soft"])
def test_an_expert_that_is_left_out_is_one_whose_output_is_0(name):
    """Weights and choices of the others stay: the same as if its last matrix were 0."""
    config = CONFIGS[name]
    weights = _weights(config)
    without = weights | {"down": weights["down"] * KEEP_E[:, None, None]}
    left_out, _ = _look(reference.apply_moe, config, weights, KEEP_E)
    expected, _ = _look(reference.apply_moe, config, without, None)
    whole, _ = _look(reference.apply_moe, config, weights, None)
    np.testing.assert_allclose(left_out, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(whole - expected).max() > 0.1


def test_the_norm_is_that_of_one_weighted_output():
    """One choice a token: the layer's output is all that its expert gives."""
    config = _moe(top_k=1, normalize_weights=False)
    y_btd, seen = _look(reference.apply_moe, config, _weights(config), np.ones(E, np.float32))
    norm_bt = np.linalg.norm(y_btd, axis=-1)
    np.testing.assert_allclose(seen.norm_bts[..., 0], norm_bt, rtol=1e-5, atol=1e-6)


def test_the_sums_of_a_layer_are_counted_one_by_one():
    """Tokens by domain and tenth, pairs of experts of one token, norms; E stands for no choice."""
    random = np.random.default_rng(2)
    expert_bts = random.permuted(np.tile(np.arange(5), (2, 6, 1)), axis=-1)[..., :3]
    norm_bts = random.random((2, 6, 3), np.float32)
    domain_bt, part_bt = random.integers(0, 2, (2, 6)), random.integers(0, 10, (2, 6))
    seen = Inspected(jnp.asarray(expert_bts), jnp.ones((2, 6, 3)), jnp.asarray(norm_bts))
    found = layer_sums(seen, jnp.eye(2)[domain_bt], jnp.eye(10)[part_bt], experts=4)

    load_de, load_pe, together_ee = (np.zeros((n, 4), int) for n in (2, 10, 4))
    norm_e = np.zeros(4)
    for at in np.ndindex(2, 6):
        real = [(e, norm) for e, norm in zip(expert_bts[at], norm_bts[at], strict=True) if e < 4]
        for expert, norm in real:
            load_de[domain_bt[at], expert] += 1
            load_pe[part_bt[at], expert] += 1
            norm_e[expert] += norm
            for other, _ in real:
                together_ee[expert, other] += 1
    assert 0 < load_de.sum() < 36, "some of the choices are none"
    np.testing.assert_array_equal(found.load_dle, load_de)
    np.testing.assert_array_equal(found.load_ple, load_pe)
    np.testing.assert_array_equal(found.coactivation_lee, together_ee)
    np.testing.assert_allclose(found.norm_le, norm_e, rtol=1e-5)


def test_a_router_that_takes_every_expert_counts_by_its_largest_weight():
    words = ["moe.router=dense", "moe.num_experts=4", "model.num_layers=1"]
    weight_l111s = np.array([0.1, 0.2, 0.6, 0.1], np.float32).reshape(1, 1, 1, 4)
    expert_l111s = np.arange(4).reshape(1, 1, 1, 4)
    seen = Inspected(*map(jnp.asarray, (expert_l111s, weight_l111s, 10 * weight_l111s)))
    found = counted_choices(seen, load_config("configs/quickstart.py", words))
    assert [leaf.reshape(-1).tolist() for leaf in found] == [[2], [pytest.approx(0.6)], [6]]
