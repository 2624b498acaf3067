"""The scaling law: planted ones are found again, and what runs do not determine is said."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image
from test_compare_runs import write_run

from moejax import scaling
from moejax.cli import main
from moejax.compare import compare
from moejax.config import ConfigError
from moejax.flops import active_counts
from moejax.overrides import load_config
from moejax.scaling import Point

ALPHA, BETA, DELTA, LEAST = 0.35, 0.3, 0.2, 1.7


def planted(n, d, e):
    return LEAST + 400 / (n**ALPHA * e**DELTA) + 300 / d**BETA


def points(noise=0.0, seed=0, experts=(1.0, 4.0, 16.0)):
    random = np.random.default_rng(seed)
    return [
        Point(n, d, e, planted(n, d, e) * math.exp(noise * random.normal()))
        for n in (1e6, 4e6, 16e6, 64e6)
        for d in (1e8, 4e8, 16e8)
        for e in experts
    ]


@pytest.fixture(scope="module")
def law():
    return scaling.fit_points(points(noise=0.003), "NDE", resamples=60)


def test_a_planted_law_is_found_exactly():
    law = scaling.fit_points(points(), "NDE", resamples=2)
    told = {name: value for name, (value, _, _) in law.parameters().items()}
    assert told == pytest.approx(
        {"c": LEAST, "alpha": ALPHA, "beta": BETA, "delta": DELTA}, rel=1e-3
    )
    assert law.value(1e9, 1e10, 64.0)[0] == pytest.approx(planted(1e9, 1e10, 64.0), rel=1e-4)
    assert law.error < 1e-6


def test_of_noisy_runs_the_interval_holds_the_truth(law):
    truth = {"c": LEAST, "alpha": ALPHA, "beta": BETA, "delta": DELTA}
    for name, (value, low, high) in law.parameters().items():
        assert low <= value <= high
        assert low - 0.1 * (high - low) <= truth[name] <= high + 0.1 * (high - low), name
    inside, far = (law.value(n, d, 4.0) for n, d in ((4e6, 4e8), (4e9, 4e11)))
    assert inside[2] - inside[1] < far[2] - far[1]  # the further, the less is known
    assert law.error == pytest.approx(0.003, rel=0.5)


def test_one_outlier_does_not_carry_the_law_away():
    spoilt = points(noise=0.001)
    spoilt[0] = spoilt[0]._replace(loss=spoilt[0].loss * 1.5)
    law = scaling.fit_points(spoilt, "NDE", resamples=1)
    assert law.parameters()["alpha"][0] == pytest.approx(ALPHA, rel=0.15)


@pytest.mark.parametrize(("axes", "experts"), [("ND", (1.0,)), ("N", (1.0,))])
def test_what_does_not_vary_is_not_in_the_law(axes, experts):
    some = [p for p in points(experts=experts) if axes == "ND" or p.D == 1e8]
    assert scaling.varying(some) == axes
    law = scaling.fit_points(some, axes, resamples=2) if axes == "ND" else None
    if law:
        assert set(law.parameters()) == {"c", "alpha", "beta"}
        assert "E" not in scaling.describe(law)[0].partition(":")[0]
    else:
        with pytest.raises(ConfigError, match="give at least 4"):
            scaling.fit_points(some[:3], axes)


def test_extrapolation_is_told_and_drawn(law, tmp_path):
    assert law.beyond(16e6, 4e8, 4.0) == 1.0
    assert law.beyond(640e6, 4e8, 4.0) == pytest.approx(10)
    assert law.beyond(64e6, 1e7, 4.0) == pytest.approx(10)
    (_, here, *_), *further = scaling.predictions(law)
    assert here == 1.0
    assert [round(beyond, 6) for _, beyond, *_ in further] == [2.0, 10.0]
    assert len(scaling.describe(law)) == 3
    scaling.plot(law, tmp_path / "law.png")
    with Image.open(tmp_path / "law.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = np.abs(pixels - [0xC8, 0x45, 0x2E]).max(axis=-1) < 12
    assert red.sum() > 300  # the runs
    grey = np.abs(pixels - [0xF1, 0xF1, 0xF1]).max(axis=-1) < 3
    assert grey.sum() > 2000  # the ground of extrapolation


def test_the_largest_n_with_the_largest_d_is_beyond_runs_of_equal_flops(tmp_path):
    """Each N with the D of one budget: at both largest it would cost 64 times that, 8 an axis."""
    budget, sizes = 1e15, (1e6, 4e6, 16e6, 64e6)
    iso = [
        Point(n, c / n, 1.0, planted(n, c / n, 1.0)) for n in sizes for c in (budget, 2 * budget)
    ]
    law = scaling.fit_points(iso, "ND", resamples=2)
    assert law.beyond(64e6, 2 * budget / 64e6, 1.0) == pytest.approx(1.0)
    (_, beyond, *_), *_ = scaling.predictions(law)
    assert beyond == pytest.approx(8.0)
    scaling.plot(law, tmp_path / "law.png")
    with Image.open(tmp_path / "law.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    grey = np.abs(pixels - [0xF1, 0xF1, 0xF1]).max(axis=-1) < 3
    assert grey.mean() > 0.5, "nearly all of both panels"


def test_an_exponent_that_runs_do_not_determine_is_named():
    flat = [p._replace(loss=2.0 + 50 / p.N**0.3) for p in points(experts=(1.0,))]
    law = scaling.fit_points(flat, "ND", resamples=2)
    assert any(line == "Not determined by these runs: beta." for line in scaling.describe(law))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"N": 1e6, "D": 1e8, "E": 1.0}, "same N, D and E: no law to fit; give runs that differ"),
        ({"N": 1e6, "D": 1e8}, "do not determine the 3 parameters"),
        ({"N": 1e6}, "E .expansion. has 2 values .1, 4. and a power law needs 3; give runs with"),
    ],
)
def test_too_little_variation_is_refused(change, error):
    experts = (1.0, 4.0) if set(change) == {"N"} else (1.0, 4.0, 16.0)
    some = [p._replace(**change) for p in points(experts=experts)]
    with pytest.raises(ConfigError, match=error):
        scaling.fit_points(some, scaling.varying(some))


def test_sizes_are_those_of_the_config():
    moe = load_config("configs/quickstart.py")
    active, expansion = scaling.sizes(moe)
    assert expansion == 8.0  # 16 experts, 2 of them used
    assert active == sum(active_counts(moe).values()) - active_counts(moe)["embeddings"]
    assert scaling.sizes(load_config("configs/quickstart_dense.py"))[1] == 1.0


def test_of_one_size_and_length_the_best_arm_counts(tmp_path, capsys):
    """Bad learning rates are no points; of the good one both seeds are, the unlucky one too."""
    for width in (64, 128, 256):
        for steps in (2, 4, 8):
            loss = 1.5 + 20 / width**0.7 + 3 / steps**0.5
            for rate, seed, more in ((0.003, 0, 1e-3), (0.003, 1, -1e-3), (0.1, 0, 0.5)):
                words = [f"model.d_model={width}", "moe.every=None", f"seed={seed}"]
                folder = tmp_path / "trials" / f"{width}_{steps}_{rate}_{seed}"
                losses = [4.0] * (steps - 1) + [loss + more]
                write_run(folder, losses, *words, f"optim.learning_rate={rate}")
    # less of both, and yet better than its like: nothing that a law in N and D can say
    write_run(
        tmp_path / "trials" / "odd",
        [4.0, 1.6],
        *("model.d_model=32", "model.num_heads=2", "model.head_dim=16", "moe.every=None"),
    )
    assert main(["compare", str(tmp_path), "--scaling"]) == 0
    shown = capsys.readouterr().out
    left_out = next(line for line in shown.splitlines() if line.startswith("Left out"))
    assert left_out.startswith("Left out of the fit, for another arm of the same N, D and E is b")
    assert "and 3 more" in left_out
    assert "_2_0.1_0 (" in left_out
    assert "0.003" not in left_out
    assert "fitted to 19 complete runs" in shown
    fitted = next(line for line in shown.splitlines() if line.startswith("Fitted, though"))
    assert "and 3 more" in fitted
    shutil.rmtree(tmp_path / "trials" / "odd")
    law = scaling.fit(compare([tmp_path]))
    assert len(law.points) == 18
    assert len(law.notes) == 1
    assert law.parameters()["beta"][0] == pytest.approx(0.5, rel=0.1)


def test_a_sweep_from_its_workdirs(tmp_path, capsys):
    """N and D from the configs; a run that is not complete is no point."""
    for width in (64, 128, 256):
        for steps in (2, 4, 8):
            words = [f"model.d_model={width}", "moe.every=None"]
            folder = tmp_path / "trials" / f"{width}_{steps}"
            loss = 1.5 + 20 / width**0.7 + 3 / steps**0.5
            write_run(folder, [4.0] * (steps - 1) + [loss], *words)
    write_run(tmp_path / "trials" / "stopped", [4.0], "model.d_model=64", steps=100)
    words = ["--scaling", "--output", str(tmp_path / "out")]
    assert main(["compare", str(tmp_path), *words]) == 0
    shown = capsys.readouterr().out
    assert "L = c + A / N^alpha + B / D^beta: c 1.5" in shown
    assert "fitted to 9 complete runs" in shown
    assert "EXTRAPOLATED 10 x" in shown
    assert "![scaling](scaling.png)" in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    law = scaling.fit(compare([tmp_path]))
    assert law.parameters()["beta"][0] == pytest.approx(0.5, rel=0.05)
