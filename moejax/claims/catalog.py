"""Claims of the literature, each with a small experiment, its rule, and what is drawn of it.

`arms` says what is trained, `training` and `images` train it, `rules`
judges numbers, and `page` runs claims and writes their page.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.claims.arms import (
    BIAS_0,
    BIAS_2,
    BIAS_3,
    BIAS_FROZEN,
    CAPACITIES,
    CAPACITY_05,
    CAPACITY_1,
    CHOICE,
    CHOICE_OF_1,
    CHOICE_OF_64,
    CONTINUED,
    DENSE,
    DENSE_8X,
    DENSE_300,
    DENSE_AT,
    DROPLESS,
    EXPERTS_4,
    EXPERTS_16,
    EXPERTS_32,
    FINE,
    FREE_EXPERTS,
    HASH,
    HASH_AT,
    LEARNED_AT,
    PRIORITIES,
    RANDOM_AT,
    RELU,
    SCRATCH,
    SHARED,
    SIGMOID_LOSS,
    SOFT,
    STEPS,
    SWITCH,
    TOKEN,
    TOP_2,
    TOP_2_FREE,
    UNBALANCED,
    UNBALANCED_FREE,
    UPCYCLED,
    Z_2,
    Z_3,
    ZERO_ROUTER,
)
from moejax.claims.images import ImageArm
from moejax.claims.rules import (
    Check,
    Results,
    curve,
    holds,
    lower,
    measured,
    not_worse,
    probed,
    random_drop,
    spread,
    steps_to_reach,
)
from moejax.claims.training import Arm

TIMES = "times"  # the key of the timings among the results


@dataclasses.dataclass(frozen=True)
class Series:
    """A line of a plot: y by x and seed [N, seeds]."""

    label: str
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plot:
    """What is drawn of a claim."""

    series: list[Series]
    xlabel: str
    ylabel: str
    logarithmic: bool = False  # the x axis, to base 2


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper and the experiment that tests it.

    Attributes:
        paper: the paper's numbers, with their source.
        matched: what the compared arms have in common.
        arms: what is trained.
        judge: results by arm -> the checks; all must pass.
        timed: arms of which the step is timed, in turn.
        remarks: what a reader has to know besides; results -> text.
        failing: shown where a check fails: what was tried, and what the other figures say.
    """

    id: str
    title: str
    paper: str
    matched: str
    arms: tuple[Arm | ImageArm, ...]
    judge: Callable[[Results], list[Check]]
    plot: Callable[[Results], Plot] | None = None
    timed: tuple[Arm, ...] = ()
    remarks: Callable[[Results], str] | str = ""
    failing: str = ""


# Rules: results -> checks


def _curves(
    results: Results, arms: tuple[Arm | ImageArm, ...], field: str = "loss"
) -> list[Series]:
    return [Series(arm.name, *curve(results, arm.name, field)) for arm in arms]


def _sparse_beats_dense(results: Results) -> list[Check]:
    dense, switch = measured(results, "dense"), measured(results, "switch")
    rows = [lower("loss of Switch below dense by at least 0.2", switch, dense, 0.2)]
    share = _speedup(results)
    rows.append(
        holds(
            "Switch reaches the dense model's last loss in fewer steps",
            f"{spread(share, 2)} times fewer",
            share > 1,
        )
    )
    seconds = share * _time(results, "dense") / _time(results, "switch")
    rows.append(holds("and in fewer seconds", f"{spread(seconds, 2)} times fewer", seconds > 1))
    return rows


def _speedup(results: Results) -> np.ndarray:
    """Returns by seed the dense model's steps over those that Switch needs for its last loss."""
    steps, dense = curve(results, "dense")
    needed = steps_to_reach(*curve(results, "switch"), dense[-1])
    return steps[-1] / needed


def _time(results: Results, arm: str) -> float:
    return results[TIMES]["step_seconds"][arm]


def _gap_closed(results: Results) -> str:
    dense, switch = measured(results, "dense"), measured(results, "switch")
    large = measured(results, "dense 8x")
    share = (dense - switch) / (dense - large)
    return (
        "The dense model with all of Switch's parameters and 8 times its feed-forward FLOPs "
        f"reaches {spread(large)}: Switch closes {spread(100 * share, 0)}% of the gap at the "
        "FLOPs of the small one. Steps to a loss compare Switch in the middle of its "
        "learning-rate schedule with dense at the end of its own."
    )


def _more_experts(results: Results) -> list[Check]:
    dense, four, eight, sixteen = (
        measured(results, name) for name in ("dense", "4 experts", "switch", "16 experts")
    )
    return [
        lower("4 experts below dense", four, dense),
        lower("8 experts below 4", eight, four),
        not_worse("16 experts not above 8 by more than 0.02", sixteen, eight, 0.02),
    ]


def _experts_plot(results: Results) -> Plot:
    names = ["dense", "4 experts", "switch", "16 experts", "32 experts"]
    loss = np.stack([measured(results, name) for name in names])
    return Plot(
        [Series("top-1", np.array([1, 4, 8, 16, 32]), loss)],
        "experts (1: dense)",
        "loss, nats",
        logarithmic=True,
    )


def _violation(results: Results, arm: str) -> np.ndarray:
    return measured(results, arm, "dropless", "max_violation")


def _collapse(results: Results) -> list[Check]:
    rows = []
    for without, balanced in (
        ("no balance loss", "switch"),
        ("no balance loss, dropless", "dropless"),
    ):
        ratio = _violation(results, without) / _violation(results, balanced)
        rule = f"MaxVio of `{without}` at least 3 times that of `{balanced}`"
        rows.append(holds(rule, f"{spread(ratio, 1)} times", ratio >= 3))
    worse = lower(
        "at capacity 1.5 the loss without is worse by at least 0.1",
        measured(results, "switch"),
        measured(results, "no balance loss"),
        0.1,
    )
    alone = _violation(results, "no balance loss, router from 0")
    rule = "from a router of zeros and no balance loss one expert takes more than half the tokens"
    return [*rows, worse, holds(rule, f"MaxVio {spread(alone, 2)} of at most 7", alone > 3)]


def _capacity(results: Results) -> list[Check]:
    rows, sweep = [], []
    for capacity in CAPACITIES:
        name = f"capacity {capacity}"
        drop = measured(results, "top-2", name, "drop_fraction")
        expected = max(1 - capacity, random_drop(capacity, 2048, 8, 2))
        found = f"{spread(100 * drop, 1)}%, expected {100 * expected:.1f}%"
        near = np.abs(drop - expected) <= 0.03
        rows.append(holds(f"drops at {name} within 3 points", found, near))
        sweep.append(measured(results, "top-2", name))
    falls = np.diff(np.array(sweep, np.float64), axis=0) <= 1e-3
    losses = ", ".join(f"{loss.mean():.3f}" for loss in sweep)
    rows.append(holds("loss falls with evaluation capacity", losses, falls))
    near = np.abs(sweep[CAPACITIES.index(1.25)] - measured(results, "top-2", "dropless"))
    rows.append(holds("capacity 1.25 within 0.01 of dropless", spread(near, 4), near < 0.01))
    trained = [measured(results, name) for name in ("capacity 0.5", "capacity 1.0", "switch")]
    rows.append(lower("trained at 0.5 worse than at 1.0", trained[1], trained[0]))
    rows.append(lower("trained at 0.5 worse than dense", measured(results, "dense"), trained[0]))
    return rows


def _capacity_plot(results: Results) -> Plot:
    loss = np.stack([measured(results, "top-2", f"capacity {c}") for c in CAPACITIES])
    return Plot(
        [Series("top-2, one training", np.array(CAPACITIES), loss)],
        "capacity factor in evaluation",
        "loss, nats",
    )


def _step_times(results: Results) -> str:
    times = results[TIMES]["step_seconds"]
    rows = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
    return f"Step times, the arms in turn and nothing beside them: {rows} (all seeds at once)."


def _dropless(results: Results) -> list[Check]:
    free, one, half = (measured(results, n) for n in ("dropless", "capacity 1.0", "capacity 0.5"))
    return [
        not_worse("dropless not above capacity 1.0 by more than 0.01", free, one, 0.01),
        lower("dropless below capacity 0.5 by at least 0.05", free, half, 0.05),
    ]


def _fine_grained(results: Results) -> list[Check]:
    base, shared = measured(results, "top-2"), measured(results, "1 shared, top 1 of 8")
    fine = measured(results, "32 experts of 8, top 8")
    return [
        not_worse("32 of 8, top 8: not worse than 8 of 32, top 2, by over 0.03", fine, base, 0.03),
        not_worse("1 shared and 1 of 8: not worse than 2 of 8 by over 0.03", shared, base, 0.03),
        lower(
            "taking the shared expert out after training costs at least 0.1",
            shared,
            measured(results, "1 shared, top 1 of 8", "without moe/shared"),
            0.1,
        ),
    ]


def _priorities(results: Results) -> list[Check]:
    rows = []
    for capacity in CAPACITIES[:4]:
        order, best = (
            measured(results, "switch", f"capacity {capacity}, {p}") for p in PRIORITIES[:2]
        )
        rows.append(
            lower(f"top-1, capacity {capacity}: by weight below order by 0.1", best, order, 0.1)
        )
    for capacity in CAPACITIES[:4]:
        order, best, own = (
            measured(results, "top-2", f"capacity {capacity}, {p}") for p in PRIORITIES
        )
        rule = f"top-2, capacity {capacity}: by own weight at most 0.005 above the better"
        rows.append(not_worse(rule, own, np.minimum(order, best), 0.005))
        below, wanted = best - order, capacity <= 0.5
        rule = (
            f"top-2, capacity {capacity}: by best weight {'below' if wanted else 'not below'} order"
        )
        found = f"{below.mean():+.3f}"
        rows.append(holds(rule, found, (below.mean() < 0) == wanted))
    return rows


def _priority_plot(results: Results) -> Plot:
    names = {"rank": "in order", "best_weight": "by best weight", "weight": "by own weight"}
    series = [
        Series(
            f"{arm}, {label}",
            np.array(CAPACITIES[:4]),
            np.stack([measured(results, arm, f"capacity {c}, {p}") for c in CAPACITIES[:4]]),
        )
        for arm in ("switch", "top-2")
        for p, label in names.items()
        if (arm, p) != ("switch", "weight")  # the same as by best weight
    ]
    return Plot(series, "capacity factor in evaluation", "loss, nats")


def _learned(results: Results) -> list[Check]:
    learned, hashed, dense, random = (
        measured(results, f"separators, {name}") for name in ("learned", "hash", "dense", "random")
    )
    return [
        lower("learned below hash by at least 0.1", learned, hashed, 0.1),
        lower("hash below dense by at least 0.1", hashed, dense, 0.1),
        lower("dense below random", dense, random),
    ]


def _learned_remarks(results: Results) -> str:
    return (
        "Here a constant token follows every symbol and is the one that predicts; 500 steps of "
        "2,560 tokens. Without separators, facts are keyed by the current token, so that hash "
        "routing is close to the ideal partition: it then reaches "
        f"{spread(measured(results, 'hash'))} against {spread(measured(results, 'dropless'))} "
        "for learned routing."
    )


def _digits(results: Results) -> list[Check]:
    soft, expert, token = (curve(results, arm.name)[1].mean(0) for arm in (SOFT, CHOICE, TOKEN))
    return [
        lower("mean loss over training: soft below expert choice", soft, expert),
        lower("expert choice below token choice", expert, token),
    ]


def _digits_remarks(results: Results) -> str:
    rows = ", ".join(
        f"{arm.name.split(', ')[1]} "
        f"{spread(100 * measured(results, arm.name, field='accuracy'), 1)}%"
        for arm in (SOFT, CHOICE, TOKEN)
    )
    return (
        f"Accuracy on the 397 other digits: {rows}. Loss in the table is that of the last 50 "
        "training steps, by which all know the digits by heart; the rules look at the mean over "
        "all steps. The encoder is `images.Encoder`: 4 blocks of the package, the last 2 "
        "with 16 experts of width 64, over 16 patches: 16 slots an image for all three."
    )


def _leak(results: Results) -> list[Check]:
    rows = []
    for name in ("expert choice in a sequence", "expert choice in the batch"):
        alone, parallel = (
            measured(results, name, "left to right", f) for f in ("loss", "parallel")
        )
        rows.append(lower(f"{name}: one pass over all tokens looks better", parallel, alone))
    alone, parallel = (
        measured(results, "dropless", "left to right", f) for f in ("loss", "parallel")
    )
    apart = np.abs(alone - parallel)
    return [*rows, holds("token choice: the same", f"{apart.max():.1e} apart", apart < 1e-4)]


def _leak_remarks(results: Results) -> str:
    truth = measured(results, "dropless", "left to right")
    rows = ", ".join(
        f"{name} {spread(measured(results, name, 'left to right'))}"
        for name in ("expert choice in a sequence", "expert choice in the batch")
    )
    return (
        "Left to right, every target is predicted by a pass over the tokens before it alone, as in "
        f"generation: token choice {spread(truth)}, {rows}."
    )


def _relu(results: Results) -> list[Check]:
    steps, active = curve(results, "ReLU", "active")
    share, wanted = active / 8, 1 / 8
    near = np.abs(share - wanted) < 0.02
    _, l1 = curve(results, "ReLU", "l1")
    ratio = l1[-1] / l1[-3]
    first = steps[np.argmax(near.all(axis=1))] if near.all(axis=1).any() else "never"
    settled = near[(steps > 150)]
    return [
        holds(
            "nearly dense at first", f"{spread(active[0], 1)} of 8 experts a token", active[0] > 2
        ),
        holds(
            "from step 150 on the share of open gates is within 0.02 of 1/8",
            f"from step {first}; last {spread(share[-1])}",
            settled,
        ),
        holds(
            "the coefficient stands still: under a factor of 2 over the last 50 steps",
            f"{spread(ratio, 2)} times",
            (ratio < 2) & (ratio > 0.5),
        ),
        not_worse(
            "loss not above dropless top-1 by more than 0.02",
            measured(results, "ReLU"),
            measured(results, "dropless"),
            0.02,
        ),
    ]


def _free_experts(results: Results) -> list[Check]:
    name = "8 experts, a zero and a copy expert"
    active = measured(results, name, "dropless", "active")
    predicted = 2 * 0.75 * 8 / (0.75 * 8 + 2)  # k tau N / (tau N + free experts)
    return [
        holds(
            f"experts with a network a token within 0.15 of the predicted {predicted:.2f}",
            spread(active, 2),
            np.abs(active - predicted) <= 0.15,
        ),
        not_worse(
            "loss not above top-2 without free experts by more than 0.02",
            measured(results, name),
            measured(results, "top-2, dropless"),
            0.02,
        ),
    ]


def _upcycling(results: Results) -> list[Check]:
    up = measured(results, "upcycled")
    start = measured(results, "upcycled", "before training")
    dense = measured(results, "dense, 300 steps")
    same = np.abs(start - dense)
    return [
        holds("the copy computes the dense model", f"{same.max():.1e} apart", same < 1e-5),
        lower("upcycled below scratch by at least 0.5", up, measured(results, "from scratch"), 0.5),
        lower(
            "upcycled below the continued dense model by at least 0.1",
            up,
            measured(results, "dense, continued"),
            0.1,
        ),
    ]


def _bias(results: Results) -> list[Check]:
    bias, none, loss = (
        _violation(results, name)
        for name in ("bias, rate 0.001", "sigmoid, no balancing", "top-2, dropless")
    )
    rows = [
        holds(
            "MaxVio with rate 0.001 at most 0.7 of that with a balance loss",
            f"{spread(bias)} against {spread(loss)}",
            bias <= 0.7 * loss,
        ),
        holds(
            "and at most a fifth of that with nothing",
            f"against {spread(none)}",
            bias <= none / 5,
        ),
        lower(
            "loss below that with nothing by at least 0.1",
            measured(results, "bias, rate 0.001"),
            measured(results, "sigmoid, no balancing"),
            0.1,
        ),
    ]
    before = curve(results, "bias, rate 0.01", "max_violation")[1][-1]
    after = curve(results, "bias, rate 0.01, then 0", "max_violation")[1][-1]
    rule = "MaxVio of single batches falls when a rate of 0.01 becomes 0"
    return [*rows, holds(rule, f"{spread(before)} to {spread(after)}", after < before)]


def _bias_remarks(results: Results) -> str:
    loss = measured(results, "sigmoid, balance loss") - measured(results, "bias, rate 0.001")
    return (
        "Against the same sigmoid router with a balance loss, the bias changes the loss by "
        f"{spread(-loss)}; the paper's gain of 0.6% in perplexity is too small to be judged here."
    )


def _agreement(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [N] and the shares of final choices that stand then [N, seeds, L]."""
    stored = results["top-2"]["agreement"]
    steps = sorted(int(step) for step in stored)
    return np.array(steps), np.array([stored[str(step)] for step in steps])


def _saturation(results: Results) -> list[Check]:
    steps, share = _agreement(results)
    by_step = ", ".join(
        f"{100 * s / STEPS:.0f}%: {a.mean():.2f}" for s, a in zip(steps, share, strict=True)
    )
    late = share[list(steps).index(240)]
    return [
        holds("agreement with the last choices rises", by_step, np.diff(share.mean(2), axis=0) > 0),
        holds(
            "after 40% of the steps above the middle between chance (k/E = 0.25) and 1",
            f"{late.mean():.2f}",
            late.mean(1) > 0.625,
        ),
    ]


def _saturation_plot(results: Results) -> Plot:
    steps, share = _agreement(results)
    layers = range(share.shape[2])
    series = [Series(f"layer {layer}", steps / STEPS, share[:, :, layer]) for layer in layers]
    return Plot(series, "share of training", "share of final top-2 choices")


def _z_loss(results: Results) -> list[Check]:
    rows, base = [], "switch"
    for arm in ("z-loss 0.001", "z-loss 0.01"):
        for name, numbers in (
            ("largest |logit|", lambda a: probed(results, a, "max_logit")),
            ("mean of lse squared", lambda a: measured(results, a, "dropless", "z")),
        ):
            ours, theirs = numbers(arm), numbers(base)
            found = f"{spread(ours, 2)} against {spread(theirs, 2)}"
            rows.append(holds(f"{arm}: {name} lower", found, ours < theirs))
        change = measured(results, arm) - measured(results, base)
        near = abs(change.mean()) <= 0.02
        rows.append(holds(f"{arm}: loss within 0.02", f"{change.mean():+.3f}", near))
    return rows


# The claims

CLAIMS = (
    Claim(
        "C1",
        "Sparse beats dense at equal active FLOPs and steps",
        "T5-Base -1.731, Switch-Base at capacity 1.25 -1.553 (negative log perplexity after 100k "
        "steps; Fedus et al. 2021, table 1); 64 experts reach T5-Base's loss 7.5 times faster in "
        "steps, about 7 times in time (figure 4)",
        "active FLOPs (feed-forward width 64) and tokens",
        (DENSE, SWITCH, DENSE_8X),
        _sparse_beats_dense,
        lambda results: Plot(
            _curves(results, (DENSE, SWITCH, DENSE_8X)), "steps", "training loss, nats"
        ),
        timed=(DENSE, SWITCH),
        remarks=_gap_closed,
    ),
    Claim(
        "C2",
        "Loss falls with the number of experts, ever less",
        "2 to 256 experts at equal FLOPs: monotone (Fedus et al. 2021, figure 4); 8 to 32 experts "
        "+10% on HellaSwag, 32 to 64 less than 2% (OLMoE, Muennighoff et al. 2024, figure 5)",
        "active FLOPs and tokens",
        (DENSE, EXPERTS_4, SWITCH, EXPERTS_16, EXPERTS_32),
        _more_experts,
        _experts_plot,
        remarks="32 experts see 64 tokens a step each, and no rule asks anything of them.",
        failing="Every seed has the sign, and 16 and 32 experts go on falling; with three seeds "
        "the interval of the step from 4 to 8 reaches over 0. Tried: 4, 8, 16 and 32 experts. More "
        "seeds would settle it and were not run.",
    ),
    Claim(
        "C3",
        "Without a balance loss the load collapses and the loss is worse",
        "perplexity 39.8 and largest over mean load 17.8 without, 35.6 and 1.14 with (Shazeer et "
        "al. 2017, table 6); without it one expert takes most tokens at once (OLMoE, figures 9 "
        "and 10)",
        "everything but the weight of the balance loss",
        (SWITCH, DROPLESS, UNBALANCED, UNBALANCED_FREE, ZERO_ROUTER),
        _collapse,
        lambda results: Plot(
            _curves(results, (SWITCH, UNBALANCED, UNBALANCED_FREE, ZERO_ROUTER), "max_violation"),
            "steps",
            "MaxVio of a batch",
        ),
        failing="At capacity 1.5 an uneven load costs loss by itself and stays nearer to even; the "
        "loss is worse in every seed, by amounts that differ too much for three seeds. Tried "
        "besides: dropless, where nothing holds the load and it collapses, and a router that "
        "starts at 0.",
    ),
    Claim(
        "C4",
        "Fewer slots drop more and cost loss; more slots cost time",
        "Switch-Base at capacity 2.0, 1.25, 1.0: -1.554, -1.553, -1.561 at 860, 910, 1000 "
        "examples a second (Fedus et al. 2021, table 1)",
        "tokens and parameters",
        (DENSE, TOP_2, SWITCH, CAPACITY_1, CAPACITY_05),
        _capacity,
        _capacity_plot,
        timed=(DENSE, CAPACITY_05, CAPACITY_1, SWITCH),
        remarks=_step_times,
        failing="The expected drops are those of a perfectly even load. The trained router is not "
        "(MaxVio of the top-2 arm): that overflows at capacity 1.0, and its tail costs a little at "
        "1.25. Tried: six capacities in evaluation, three in training; no arm with a stronger "
        "balance loss was.",
    ),
    Claim(
        "C5",
        "Dropless is not worse than dropping at equal nominal cost",
        "dropless MoE reaches the loss of the best fixed capacity up to 1.4 times faster "
        "(MegaBlocks, Gale et al. 2022)",
        "active FLOPs and tokens; each arm evaluated as it was trained",
        (DROPLESS, CAPACITY_1, CAPACITY_05),
        _dropless,
    ),
    Claim(
        "C6",
        "Who is served first matters when slots are few",
        "V-MoE-H/14 at half capacity with batch-prioritised routing 58.6 against 60.1 at full "
        "capacity; at 0.15 it is still as good as dense, where order collapses (Riquelme et al. "
        "2021, figures 6, 7)",
        "one training; only the order of service in evaluation differs",
        (SWITCH, TOP_2),
        _priorities,
        _priority_plot,
        remarks="By best weight, tokens with the largest weight come first (batch-prioritised "
        "routing); by own weight, assignments do. With top-2 and weights that sum to 1, the token "
        "with the largest first weight has the smallest second one: once all first choices fit, "
        "serving it first gives second slots to the assignments that matter least.",
    ),
    Claim(
        "C7",
        "Learned routing beats hash, which beats dense; random is worst",
        "Pile loss of 2B models: dense 2.060, hash 1.932, Switch 1.881 (DeepSeekMoE, Dai et al. "
        "2024, table 1)",
        "active FLOPs and tokens; dropless",
        (LEARNED_AT, HASH_AT, DENSE_AT, RANDOM_AT, HASH, DROPLESS),
        _learned,
        lambda results: Plot(
            _curves(results, (LEARNED_AT, HASH_AT, DENSE_AT, RANDOM_AT)),
            "steps",
            "training loss, nats",
        ),
        remarks=_learned_remarks,
        failing="Tried: the task without separators, where hash routing is ahead, and the task "
        "with them, made so that the token itself says little; learned routing is then ahead on "
        "average, by less than the rule asks. A language in which the right expert depends on more "
        "than two tokens was not tried.",
    ),
    Claim(
        "C8",
        "Fine-grained and shared experts at equal total and active parameters",
        "Pile loss 1.867 (GShard) to 1.808 (fine-grained and shared); 1.808 to 2.414 when the "
        "shared expert is taken out at test (DeepSeekMoE, Dai et al. 2024, table 1 and section "
        "4.5)",
        "total and active parameters, tokens",
        (TOP_2, FINE, SHARED),
        _fine_grained,
        remarks="The paper's gain of 3% is not asked for at this size; no loss is.",
    ),
    Claim(
        "C9",
        "An upcycled MoE is ahead of one from scratch and of its dense parent, early on",
        "about half of the dense model's training cost on top beats training it on (Komatsuzaki "
        "et al. 2022); training from scratch catches up after a quarter of the dense budget "
        "(OLMoE, figure 8)",
        "steps and tokens; an MoE of two experts of width 64 a token has twice the active "
        "feed-forward FLOPs of its dense parent",
        (DENSE_300, UPCYCLED, CONTINUED, SCRATCH),
        _upcycling,
        lambda results: Plot(
            _curves(results, (UPCYCLED, CONTINUED, SCRATCH)),
            "steps after the first 300",
            "training loss, nats",
        ),
        remarks="All three start anew with warm-up, schedule and optimizer state.",
    ),
    Claim(
        "C11",
        "Soft MoE beats expert choice beats token choice on images at equal slots",
        "Soft MoE B/16 matches ViT-H/14 at 10.5 times less inference cost (Puigcerver et al. "
        "2023); expert choice converges over twice as fast as top-1 and top-2 (Zhou et al. 2022)",
        "slots, experts and images; 300 steps of 64 images, 5 seeds",
        (SOFT, CHOICE, TOKEN),
        _digits,
        lambda results: Plot(
            _curves(results, (SOFT, CHOICE, TOKEN)), "steps", "training loss, nats"
        ),
        remarks=_digits_remarks,
        failing="The digits are few and easy: all three know them by heart within the run. Tried: "
        "the mean loss over training instead of the last, five seeds instead of three, and the "
        "accuracy on other digits, in which soft is between the two and not ahead.",
    ),
    Claim(
        "C12",
        "Expert choice reads ahead in a language model",
        "more than K log2((1 - R) / R) bits a token can leak (Wang et al. 2024, appendix D); "
        "worse than token choice at equal tokens (OLMoE)",
        "active FLOPs and tokens",
        (CHOICE_OF_1, CHOICE_OF_64, DROPLESS),
        _leak,
        remarks=_leak_remarks,
        failing="In the batch the leak has the sign in every seed, but its size differs, and three "
        "seeds give an interval over 0. Tried: groups of one sequence, where the claim holds, and "
        "of 64.",
    ),
    Claim(
        "C14",
        "A selection bias balances at least as well as a balance loss",
        "1B: perplexity 9.56 to 9.50 and MaxVio 0.72 to 0.04; 3B: 7.97 to 7.92 and 0.52 to 0.04 "
        "(Wang et al. 2024, table 2)",
        "active FLOPs, tokens, dropless",
        (TOP_2_FREE, BIAS_0, BIAS_3, BIAS_2, SIGMOID_LOSS, BIAS_FROZEN),
        _bias,
        lambda results: Plot(
            _curves(results, (TOP_2_FREE, BIAS_0, BIAS_3, BIAS_2), "max_violation"),
            "steps",
            "MaxVio of a batch",
        ),
        remarks=_bias_remarks,
        failing="The balance is what the paper says, and much better than with a loss. Without "
        "any balancing the dropless model is hardly worse here, so there is no loss to win; a "
        "bias that stops moving keeps its balance, and its batches are neither more nor less "
        "even. Tried: rates of 0.001 and 0.01, and 75 steps at rate 0 after the second.",
    ),
    Claim(
        "C15",
        "Routing settles early",
        "up to 60% of the top-8 choices are final after 1% of training, 80% after 40%; the first "
        "layer settles last (OLMoE, section 5)",
        "one arm",
        (TOP_2,),
        _saturation,
        _saturation_plot,
    ),
    Claim(
        "C16",
        "The z-loss keeps router logits small at no cost in loss",
        "4 of 6 trainings stable without, 3 of 3 with; quality -1.755 to -1.741 (ST-MoE, Zoph et "
        "al. 2022, table 4)",
        "everything but the weight of the z-loss",
        (SWITCH, Z_3, Z_2),
        _z_loss,
        remarks="Training does not diverge at this size, so only the mechanism is tested.",
        failing="What the loss punishes falls. For that the logits of a token move down together "
        "until their exponentials sum to about 1; their spread stays: the largest in absolute "
        "value is then a negative one. The loss moves by no more than seeds differ. Tried: weights "
        "of 0.001 and 0.01.",
    ),
    Claim(
        "C17",
        "ReLU routing reaches the wanted sparsity by itself",
        "loss 1.716 to 1.689 at 469M parameters; the sparsity settles in about 110 steps (ReMoE, "
        "Wang et al. 2024, table 3)",
        "wanted active FLOPs (1 of 8 experts) and tokens",
        (RELU, DROPLESS),
        _relu,
        lambda results: Plot(_curves(results, (RELU,), "active"), "steps", "experts a token, of 8"),
        failing="The sparsity does what the paper says. The loss is above that of top-1 on "
        "average, and differs less between seeds. Tried: this one schedule of the coefficient, "
        "the paper's.",
    ),
    Claim(
        "C18",
        "Zero-computation experts take a part of the assignments",
        "1.1 to 2.1 times the expert throughput at no loss in quality (MoE++, Jin et al. 2024)",
        "experts with a network, top-2, tokens; dropless",
        (FREE_EXPERTS, TOP_2_FREE),
        _free_experts,
        failing="The prediction supposes the balance that the loss asks for, with tau 0.75; the "
        "load of this arm is less even than without free experts (MaxVio in the table), towards "
        "the experts with a network. Tried: this tau and this weight of the balance loss only.",
    ),
)
