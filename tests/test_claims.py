"""The claims: their data, their training, their rules on hand-written numbers, and their page.

The experiments themselves are run by `make claims`, not here.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from moejax.claims import arms as claim_arms
from moejax.claims import catalog as claims
from moejax.claims import page as claim_page
from moejax.claims import training as claim_training
from moejax.claims.images import train_images
from moejax.claims.rules import (
    half_width,
    holds,
    lower,
    not_worse,
    random_drop,
    spread,
    steps_to_reach,
)
from moejax.claims.tasks import Images, MarkovTask, digit_images
from moejax.claims.training import (
    Arm,
    agreement,
    initial_states,
    make_seeds,
    mutual_information,
    run_arm,
    train,
)
from moejax.config import ConfigError, ModelConfig, TrainConfig

# Data

SMALL = MarkovTask(symbols=5, domains=2, length=8)


def _draw(task, size=64, seed=0):
    table = task.table(jax.random.key(seed))
    batch = jax.jit(task.batch, static_argnums=2)(jax.random.key(seed + 1), table, size)
    return np.asarray(table), jax.tree.map(np.asarray, batch)


def _following(task, table, batch):
    """Returns target and what the table says for every target with a loss, and the domains."""
    stride = 2 if task.separators else 1
    stream = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    domain = batch.domains[:, 0]
    found = []
    for row, t in zip(*np.nonzero(batch.loss_mask), strict=True):
        at = t + 1
        before, last = stream[row, at - 2 * stride], stream[row, at - stride]
        found.append((batch.targets[row, t], table[domain[row], before, last], domain[row]))
    return np.array(found)


@pytest.mark.parametrize("separators", [False, True])
def test_targets_follow_the_table_of_their_domain(separators):
    task = dataclasses.replace(SMALL, noise=0.0, separators=separators)
    table, batch = _draw(task)
    found = _following(task, table, batch)
    assert (found[:, 0] == found[:, 1]).all()
    assert set(found[:, 2]) == {0, 1}
    assert (table[0] != table[1]).any()
    np.testing.assert_array_equal(batch.tokens[:, 0], task.symbols + batch.domains[:, 0])
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.tokens.max() < task.vocab_size


def test_the_first_loss_is_where_the_table_decides():
    _, batch = _draw(SMALL)
    np.testing.assert_array_equal(batch.loss_mask[0], np.arange(8) >= 2)


def test_separators_stand_where_the_loss_is():
    task = dataclasses.replace(SMALL, separators=True)
    _, batch = _draw(task)
    at = np.arange(8)
    np.testing.assert_array_equal(batch.loss_mask[0], (at >= 4) & (at % 2 == 0))
    assert (batch.tokens[:, 2::2] == task.vocab_size - 1).all()
    assert (batch.tokens[:, 1::2] < task.symbols).all()


def test_entropy_is_that_of_the_distribution():
    """One symbol in ten is any symbol, the likely one included."""
    task = MarkovTask()
    p = np.full(48, 0.1 / 48)
    p[7] += 0.9
    assert task.entropy == pytest.approx(-(p * np.log(p)).sum())
    assert task.entropy == pytest.approx(0.697, abs=5e-4)
    assert MarkovTask(noise=1.0).entropy == pytest.approx(math.log(48))
    assert MarkovTask(noise=0.0).entropy == 0


def test_entropy_is_that_of_the_generator():
    task = dataclasses.replace(SMALL, noise=0.5)
    table, batch = _draw(task, size=2000)
    found = _following(task, table, batch)
    likely = (found[:, 0] == found[:, 1]).mean()
    assert likely == pytest.approx(0.5 + 0.5 / 5, abs=0.02)
    rest = (1 - likely) / 4
    estimate = -likely * math.log(likely) - 4 * rest * math.log(rest)
    assert estimate == pytest.approx(task.entropy, abs=0.02)


def test_digits_are_cut_into_patches(monkeypatch):
    import sys
    import types

    pixels = np.arange(3 * 64, dtype=np.float64).reshape(3, 64) % 17
    module = types.ModuleType("sklearn.datasets")
    module.load_digits = lambda return_X_y: (pixels, np.array([0, 1, 2]))
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    first, rest = digit_images(train=2)
    assert first.patch_ntp.shape == (2, 16, 4)
    assert rest.label_n.shape == (1,)
    image = pixels[rest.label_n[0]].reshape(8, 8) / 16
    np.testing.assert_allclose(rest.patch_ntp[0, 5], image[2:4, 2:4].reshape(-1))


def test_digits_ask_for_the_package_they_come_with(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install 'moejax\\[claims\\]'"):
        digit_images()


# Training


def _tiny(name="tiny", steps=3, **changes):
    config = claim_arms.config(
        claim_arms.moe(**{"num_experts": 2, "expert_hidden": 8, "group_sequences": 4, **changes}),
        task=SMALL,
        dense_hidden=8,
    )
    model = ModelConfig(
        num_layers=1,
        d_model=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        dense_hidden=8,
        vocab_size=SMALL.vocab_size,
    )
    config = dataclasses.replace(config, model=model, train=TrainConfig(steps=steps, batch_size=4))
    return Arm(name, config, task=SMALL, seeds=2)


@pytest.fixture(scope="module", autouse=True)
def _few_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim_training, "EVALUATED", 2)
        yield


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_alone():
    arm = _tiny()
    both = train(arm, make_seeds(SMALL, (0, 1)))
    alone = train(arm, make_seeds(SMALL, (1,)))
    pairs = [
        (jax.tree.map(lambda p: p[1], both.params), jax.tree.map(lambda p: p[0], alone.params))
    ]
    pairs.append((both.steps.loss[:, 1], alone.steps.loss[:, 0]))
    pairs.append((both.steps.count_le[:, 1], alone.steps.count_le[:, 0]))
    for ours, theirs in pairs:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), ours, theirs
        )
    assert not np.allclose(both.steps.loss[:, 0], both.steps.loss[:, 1])


@pytest.mark.slow
def test_arms_share_the_first_values_of_what_they_share():
    sparse, dense = _tiny(), _tiny(every=None)
    seeds = make_seeds(SMALL, (0,))
    ours, theirs = (initial_states(arm, seeds, None).params for arm in (sparse, dense))
    np.testing.assert_array_equal(ours["embedding"], theirs["embedding"])
    np.testing.assert_array_equal(ours["unembedding"], theirs["unembedding"])
    attention = [p["layer_0"]["attention"]["query"] for p in (ours["runs"], theirs["prefix"])]
    np.testing.assert_array_equal(*attention)


@pytest.mark.slow
def test_an_upcycled_arm_computes_what_its_dense_parent_does(tmp_path):
    parent = _tiny("parent", every=None)
    free = {"top_k": 2, "normalize_weights": True, "capacity_factor": None}
    arm = dataclasses.replace(_tiny("child", steps=1, **free), start=parent, change="upcycle")
    result = run_arm(arm, tmp_path)
    start = result["evaluations"]["before training"]["loss"]
    stored = json.loads((tmp_path / "parent.json").read_text())
    np.testing.assert_allclose(start, stored["evaluations"]["as trained"]["loss"], rtol=1e-6)
    assert arm.steps_before == 3


def test_a_router_of_zeros_sends_everything_to_one_expert():
    arm = dataclasses.replace(_tiny(), change="zero_router")
    trained = train(arm, make_seeds(SMALL, (0,)))
    assert trained.steps.count_le is not None
    assert trained.steps.count_le[0, 0, 0].tolist() == [4 * 8, 0]


@pytest.mark.slow
def test_results_are_stored_and_used_again(tmp_path, monkeypatch):
    arm = dataclasses.replace(
        _tiny(), evaluations={"capacity 0.5": {"capacity_factor": 0.5}}, routing_after=(1, 3)
    )
    result = run_arm(arm, tmp_path)
    assert result["evaluations"]["capacity 0.5"]["drop_fraction"] == pytest.approx(
        [0.5] * 2, abs=0.4
    )
    assert result["evaluations"]["dropless"]["drop_fraction"] == [0, 0]
    assert result["agreement"]["3"] == [[1.0], [1.0]]
    assert np.shape(result["probe"]["information"]) == (2, 1)
    assert result["curve"]["step"] == [3]

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(claim_training, "train", refuse)
    assert run_arm(arm, tmp_path) == result
    with pytest.raises(AssertionError, match="trained again"):
        run_arm(dataclasses.replace(arm, seeds=3), tmp_path)
    claim_training.arm_file(tmp_path, arm).write_text("{")  # torn
    with pytest.raises(AssertionError, match="trained again"):
        run_arm(arm, tmp_path)


def test_information_of_the_domain_on_the_expert():
    domain = np.array([0, 0, 1, 1])
    own = np.repeat(domain, 6).reshape(4, 3, 2)
    assert mutual_information(own, domain, 2) == pytest.approx(math.log(2))
    either = np.tile([0, 1], (4, 3, 1))
    assert mutual_information(either, domain, 2) == pytest.approx(0)
    padded = np.where(np.arange(3)[None, :, None] == 2, 2, own)  # the sentinel counts nowhere
    assert mutual_information(padded, domain, 2) == pytest.approx(math.log(2))


def test_agreement_counts_experts_that_were_there_in_any_order():
    early = np.array([[[[[0, 1], [2, 3]]]]])
    late = np.array([[[[[1, 0], [2, 4]]]]])
    assert agreement(early, late).tolist() == [[0.75]]


def test_an_arm_is_known_by_what_differs_from_the_defaults():
    arm = _tiny()
    assert dataclasses.replace(arm).key == arm.key
    assert dataclasses.replace(arm, seeds=5).key != arm.key
    assert _tiny(num_experts=4).key != arm.key
    assert dataclasses.replace(arm, start=_tiny("other")).key != arm.key
    assert dataclasses.replace(arm, task=MarkovTask(symbols=6)).key != arm.key


@pytest.mark.slow
def test_evaluation_left_to_right_tells_who_reads_ahead(tmp_path):
    picked = {"router": "expert_choice", "allow_noncausal": True, "normalize_weights": True}
    for name, changes in {"token": {}, "expert": picked}.items():
        arm = _tiny(name, steps=1, capacity_factor=None, group_sequences=1, **changes)
        result = run_arm(dataclasses.replace(arm, left_to_right=True), tmp_path)
        both = result["evaluations"]["left to right"]
        apart = np.abs(np.subtract(both["loss"], both["parallel"])).max()
        assert (apart > 1e-4) == (name == "expert")


@pytest.mark.slow
@pytest.mark.parametrize("router", ["softmax", "soft"])
def test_images_are_learned(router):
    arm = claim_arms.TOKEN if router == "softmax" else claim_arms.SOFT
    model = dataclasses.replace(
        arm.config.model, num_layers=2, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8
    )
    moe = dataclasses.replace(arm.config.moe, first_dense=1, num_experts=2, expert_hidden=8)
    optim = dataclasses.replace(arm.config.optim, warmup_steps=5)
    config = dataclasses.replace(
        arm.config, model=model, moe=moe, optim=optim, train=TrainConfig(steps=40, batch_size=16)
    )
    random = np.random.default_rng(0)
    label_n = random.integers(0, 2, 64).astype(np.int32)
    patches = random.normal(size=(64, 4, 3)).astype(np.float32) + label_n[:, None, None]
    images = Images(patches, label_n)
    result = train_images(dataclasses.replace(arm, config=config, seeds=2), images, images)
    assert result["curve"]["step"] == [25, 40]
    first, last = np.array(result["curve"]["loss"])
    assert (last < first).all()
    assert min(result["evaluations"]["as trained"]["accuracy"]) > 0.7


# Rules


def test_lower_asks_for_the_margin_in_every_seed_and_for_more_than_chance():
    base = np.array([2.0, 2.1, 2.2])
    assert lower("", base - 0.3, base, 0.2).passed
    assert not lower("", base - np.array([0.3, 0.3, 0.1]), base, 0.2).passed  # one seed
    assert not lower("", base + 0.3, base).passed  # the sign
    assert not lower("", base - np.array([0.01, 0.5, 0.01]), base).passed  # the interval
    assert lower("", base - 0.3, base).found == "-0.300 ± 0.000 (-0.300, -0.300, -0.300)"


def test_not_worse_looks_at_the_mean():
    base = np.array([2.0, 2.0])
    assert not_worse("", base + np.array([0.05, -0.02]), base, 0.02).passed
    assert not not_worse("", base + np.array([0.05, 0.0]), base, 0.02).passed


def test_holds_asks_every_seed():
    assert holds("", "", np.array([True, True])).passed
    assert not holds("", "", np.array([True, False])).passed
    assert not holds("", "", np.nan > 1).passed


def test_half_width_is_that_of_students_interval():
    assert half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.48, abs=0.01)
    assert half_width(np.array([1.0])) == math.inf
    assert spread(np.array([1.0, 2.0, 3.0])) == "2.000 ± 1.000"
    assert spread(np.array([1.0])) == "1.000"


@pytest.mark.parametrize(
    ("capacity", "tokens", "experts", "top_k", "drop"),
    [
        (1.0, 2048, 8, 1, 0.0233),
        (1.0, 2048, 8, 2, 0.0153),
        (1.0, 1024, 32, 1, 0.0694),
        (1.25, 1024, 32, 1, 0.0059),
        (1.0, 1024, 64, 8, 0.0330),
        (0.5, 2048, 8, 1, 0.5),
    ],
)
def test_random_drop(capacity, tokens, experts, top_k, drop):
    assert random_drop(capacity, tokens, experts, top_k) == pytest.approx(drop, abs=1e-4)


def test_steps_to_reach_interpolates():
    steps = np.array([10, 20, 30])
    loss = np.array([[3.0, 1.0, 3.0], [2.0, 0.9, 2.9], [1.0, 0.8, 2.8]])
    found = steps_to_reach(steps, loss, np.array([1.5, 1.0, 2.0]))
    assert found[:2].tolist() == [25, 10]
    assert math.isnan(found[2])


# The claims, judged on hand-written numbers


def _result(arm, loss, **fields):
    """Returns a result in which every evaluation has the same numbers in two layers."""
    seeds = np.array([0.0, 0.01, -0.01])
    by_layer = {"max_violation": 0.2, "dead_experts": 0.0, "router_entropy": 1.0, "z": 4.0}
    by_layer["active"] = 1.5
    by_layer |= {name: value for name, value in fields.items() if name in by_layer}
    evaluation = {"loss": (loss + seeds).tolist(), "drop_fraction": [0.0] * 3}
    evaluation |= {name: [[value] * 2] * 3 for name, value in by_layer.items()}
    names = ["as trained", "dropless", "before training", *getattr(arm, "evaluations", {})]
    evaluations = {name: dict(evaluation) for name in names}
    evaluations["as trained"]["accuracy"] = [0.97] * 3
    without = (loss + fields.get("without", 0.5) + seeds).tolist()
    evaluations["without moe/shared"] = {"loss": without}
    parallel = (loss - fields.get("leak", 0.0) + seeds).tolist()
    evaluations["left to right"] = {"loss": evaluation["loss"], "parallel": parallel}
    violation = fields.get("batch_violation", 0.3)
    return {
        "parameters": 1000,
        "steps": 600,
        "curve": {
            "step": [100, 300, 600],
            "loss": [[3.5] * 3, [3.0] * 3, [loss] * 3],
            "max_violation": [[0.5] * 3, [0.5] * 3, [violation] * 3],
            "active": [[4.0] * 3, [1.05] * 3, [fields.get("open", 1.05)] * 3],
            "l1": [[1e-6] * 3, [2e-4] * 3, [fields.get("l1", 1e-6)] * 3],
        },
        "evaluations": evaluations,
        "probe": {
            "max_logit": [[fields.get("max_logit", 5.0)] * 2] * 3,
            "information": [[0.1] * 2] * 3,
        },
    }


NUMBERS = {
    "dense": {"loss": 2.1},
    "dense 8x": {"loss": 1.4},
    "4 experts": {"loss": 1.9},
    "16 experts": {"loss": 1.65},
    "capacity 0.5": {"loss": 2.5},
    "capacity 1.0": {"loss": 1.8},
    "no balance loss": {"loss": 1.95, "max_violation": 1.0},
    "no balance loss, dropless": {"loss": 1.9, "max_violation": 1.8},
    "no balance loss, router from 0": {"loss": 2.2, "max_violation": 7.0},
    "from scratch": {"loss": 3.1},
    "dense, continued": {"loss": 2.0},
    "dense, 300 steps": {"loss": 1.75},
    "sigmoid, no balancing": {"loss": 2.0, "max_violation": 1.7},
    "bias, rate 0.001": {"loss": 1.75, "max_violation": 0.08},
    "bias, rate 0.01, then 0": {"loss": 1.75, "batch_violation": 0.1},
    "expert choice in a sequence": {"loss": 1.9, "leak": 0.3},
    "expert choice in the batch": {"loss": 1.9, "leak": 0.3},
    "digits, soft": {"loss": 0.1},
    "digits, expert choice": {"loss": 0.2},
    "digits, token choice": {"loss": 0.3},
    "separators, hash": {"loss": 2.0},
    "separators, dense": {"loss": 2.3},
    "separators, random": {"loss": 2.7},
    "z-loss 0.001": {"loss": 1.75, "max_logit": 4.0, "z": 2.0},
    "z-loss 0.01": {"loss": 1.76, "max_logit": 3.0, "z": 1.0},
}


def _results(**changes):
    """Returns results that every claim accepts, but for `changes` by arm."""
    results = {}
    for arm in claim_page.needed_arms(claims.CLAIMS):
        numbers = {"loss": 1.75} | NUMBERS.get(arm.name, {}) | changes.get(arm.name, {})
        results[arm.name] = _result(arm, **numbers)
    for arm in ("switch", "top-2"):
        for capacity in claim_arms.CAPACITIES[:4]:
            gain = -0.1 if arm == "top-2" and capacity > 0.5 else 0.2
            for priority, more in (("rank", 0.3), ("best_weight", 0.3 - gain), ("weight", 0.1)):
                loss = [1.75 + more + seed for seed in (0.0, 0.01, -0.01)]
                name = f"capacity {capacity}, {priority}"
                results[arm]["evaluations"][name] = {"loss": loss}
    sweep = results["top-2"]["evaluations"]
    for capacity, extra in zip(claim_arms.CAPACITIES, (1.5, 0.4, 0.1, 0.02, 0.0, 0.0), strict=True):
        sweep[f"capacity {capacity}"] = {
            "loss": (np.array(sweep["dropless"]["loss"]) + extra).tolist(),
            "drop_fraction": [max(1 - capacity, 0.01)] * 3,
        }
    share = {6: 0.3, 30: 0.4, 60: 0.5, 240: 0.8, 600: 1.0}
    results["top-2"]["agreement"] = {str(s): [[a, a]] * 3 for s, a in share.items()}
    results["times"] = {"step_seconds": dict.fromkeys(results, 0.05)}
    return results


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_holds_on_numbers_like_the_papers(claim):
    checks = claim.judge(_results())
    assert [check for check in checks if not check.passed] == []


FAILURES = [
    ("C1", "switch", {"loss": 1.95}),
    ("C1", "switch", {"loss": 2.2}),
    ("C2", "4 experts", {"loss": 2.2}),
    ("C2", "16 experts", {"loss": 1.8}),
    ("C3", "no balance loss", {"loss": 1.8, "max_violation": 1.0}),
    ("C3", "no balance loss", {"loss": 1.95, "max_violation": 0.3}),
    ("C4", "capacity 0.5", {"loss": 2.0}),
    ("C5", "dropless", {"loss": 1.9}),
    ("C7", "separators, hash", {"loss": 1.8}),
    ("C7", "separators, random", {"loss": 2.2}),
    ("C8", "32 experts of 8, top 8", {"loss": 1.8}),
    ("C8", "1 shared, top 1 of 8", {"without": 0.05}),
    ("C9", "dense, 300 steps", {"loss": 1.8}),
    ("C9", "dense, continued", {"loss": 1.8}),
    ("C11", "digits, soft", {"loss": 0.25}),
    ("C11", "digits, token choice", {"loss": 0.15}),
    ("C12", "expert choice in the batch", {"leak": 0.0}),
    ("C12", "dropless", {"leak": 0.01}),
    ("C14", "bias, rate 0.001", {"loss": 1.75, "max_violation": 0.19}),
    ("C14", "bias, rate 0.01, then 0", {"batch_violation": 0.4}),
    ("C16", "z-loss 0.01", {"loss": 1.76, "max_logit": 6.0, "z": 1.0}),
    ("C16", "z-loss 0.001", {"loss": 1.79, "max_logit": 4.0, "z": 2.0}),
    ("C17", "ReLU", {"open": 1.3}),
    ("C17", "ReLU", {"l1": 1e-5}),
    ("C17", "ReLU", {"loss": 1.8}),
    ("C18", "8 experts, a zero and a copy expert", {"active": 1.7}),
    ("C18", "8 experts, a zero and a copy expert", {"loss": 1.8}),
]


@pytest.mark.parametrize(("name", "arm", "numbers"), FAILURES)
def test_a_claim_fails_on_other_numbers(name, arm, numbers):
    (claim,) = claim_page.choose([name])
    failed = [check for check in claim.judge(_results(**{arm: numbers})) if not check.passed]
    assert failed


def test_priorities_fail_on_other_numbers():
    results = _results()
    (claim,) = claim_page.choose(["C6"])
    results["switch"]["evaluations"]["capacity 0.5, best_weight"]["loss"] = [2.0] * 3
    results["top-2"]["evaluations"]["capacity 0.25, weight"]["loss"] = [2.1] * 3
    results["top-2"]["evaluations"]["capacity 1.0, best_weight"]["loss"] = [2.0] * 3
    rules = [check.rule for check in claim.judge(results) if not check.passed]
    assert [rule.split(":")[0] for rule in rules] == [
        "top-1, capacity 0.5",
        "top-2, capacity 0.25",
        "top-2, capacity 1.0",
    ]


def test_capacity_and_saturation_fail_on_other_numbers():
    results = _results()
    sweep = results["top-2"]["evaluations"]
    sweep["capacity 0.5"]["drop_fraction"] = [0.45] * 3
    sweep["capacity 0.75"]["loss"] = [4.0] * 3
    rules = [
        check.rule for check in claim_page.choose(["C4"])[0].judge(results) if not check.passed
    ]
    assert rules == ["drops at capacity 0.5 within 3 points", "loss falls with evaluation capacity"]
    results["top-2"]["agreement"]["240"] = [[0.45, 0.45]] * 3
    (claim,) = claim_page.choose(["C15"])
    assert [check.passed for check in claim.judge(results)] == [False, False]


# The page


def test_the_page_has_a_verdict_a_table_and_a_plot_a_claim(tmp_path):
    results = _results(**{"16 experts": {"loss": 1.8}})
    chosen = claim_page.choose(None)
    checks = {claim.id: claim.judge(results) for claim in chosen}
    page = tmp_path / "claims.md"
    claim_page.write_page(page, chosen, results, checks)
    text = page.read_text()
    failed = [c for c in chosen if c.failing and not all(k.passed for k in checks[c.id])]
    assert text.count("**What was tried.**") == len(failed)
    rows = {line.split("]")[0][3:]: line for line in text.splitlines() if line.startswith("| [C")}
    assert set(rows) == {claim.id for claim in claims.CLAIMS}
    assert rows["C2"].endswith("| **fails** |")
    assert rows["C1"].endswith("| holds |")
    for claim in chosen:
        assert f"## {claim.id} {claim.title}\n" in text
        image = tmp_path / "claims" / f"{claim.id}.png"
        assert image.exists() == (claim.plot is not None)
        assert (f"](claims/{claim.id}.png)" in text) == (claim.plot is not None)


def test_claims_have_ids_and_arms_have_names_of_their_own():
    ids = [claim.id for claim in claims.CLAIMS]
    assert len(ids) == len(set(ids))
    arms = claim_page.needed_arms(claims.CLAIMS)
    files = {claim_training.arm_file(claim_page.Path(), arm) for arm in arms}
    assert len(files) == len(arms)
    position = {arm.name: index for index, arm in enumerate(arms)}
    for arm in arms:
        assert arm.start is None or position[arm.start.name] < position[arm.name]


def test_an_unknown_claim_is_refused():
    with pytest.raises(ConfigError, match="unknown claim 'C99'; choose from C1, C2"):
        claim_page.choose(["C99"])


@pytest.mark.slow
def test_one_claim_from_training_to_page(tmp_path, monkeypatch, capsys):
    arm = _tiny()
    claim = claims.Claim(
        "C0",
        "A small model trains",
        "none",
        "nothing",
        (arm,),
        lambda results: [holds("it has a loss", "yes", np.isfinite(results["tiny"]["parameters"]))],
        timed=(arm,),
    )
    monkeypatch.setattr(claim_page, "CLAIMS", (claim,))
    monkeypatch.setattr(claim_page, "ROUNDS", 1)
    page = tmp_path / "docs" / "page.md"
    assert claim_page.run_claims(["C0"], tmp_path / "runs", page) == {"C0": True}
    assert "## C0 A small model trains" in page.read_text()
    first = (tmp_path / "runs" / "tiny.json").stat().st_mtime_ns
    claim_page.run_claims(None, tmp_path / "runs", page)
    assert (tmp_path / "runs" / "tiny.json").stat().st_mtime_ns == first
    claim_page.run_claims(None, tmp_path / "runs", page, fresh=True)
    assert (tmp_path / "runs" / "tiny.json").stat().st_mtime_ns > first
    assert "tiny: loss" in capsys.readouterr().out
