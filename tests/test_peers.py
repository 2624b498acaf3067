"""What `make bench-peers` rests on, without torch: the model's size, the workers, the check."""

import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.flops import active_parameters, total_parameters
from moejax.overrides import load_config

ROOT = Path(__file__).parents[1]
FILE = ROOT / "configs" / "bench" / "mixtral_62m.py"
SMALL = [
    *("model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "model.vocab_size=64", "moe.expert_hidden=32"),
    *("data.sequence_length=16", "optim.learning_rate=0.01"),
]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    yield peers
    for name in ("common", "peers"):
        sys.modules.pop(name, None)


def test_the_model_has_the_size_of_the_peers():
    config = load_config(str(FILE))
    assert round(total_parameters(config) / 1e6, 1) == 61.9
    assert round(active_parameters(config) / 1e6, 1) == 24.1
    assert config.train.batch_size * config.data.sequence_length == 2048
    for devices in (1, 8):
        config.check_mesh(load_config(str(FILE), [f"mesh.expert={devices}"]).mesh)


@pytest.mark.slow
def test_two_workers_take_turns_and_agree(peers, tmp_path):
    """The protocol, with moejax on one device and on two: same data, same weights, same losses."""
    python, weights = Path(sys.executable), tmp_path / "weights.npz"
    side = "moejax_side.py"
    with (
        peers.start(python, FILE, side, SMALL, str(weights)) as one,
        peers.start(python, FILE, side, [*SMALL, "mesh.expert=2"], "") as two,
    ):
        assert (one.facts["devices"], two.facts["devices"]) == (1, 2)
        config = load_config(str(FILE), SMALL)
        with np.load(weights) as arrays:
            saved = sum(arrays[name].size for name in arrays.files)
        assert one.facts["parameters"] == two.facts["parameters"] == saved
        assert total_parameters(config) == saved
        turns = [(one.train(n), two.train(n)) for n in (1, 8)]
    losses = [[loss for turn in turns for loss in turn[side]["losses"]] for side in (0, 1)]
    assert len(losses[0]) == 9
    peers.check_losses(*losses, config.model.vocab_size)
    assert all(answer["cpu"] > 0 and answer["wall"] > 0 for turn in turns for answer in turn)


def test_a_worker_that_fails_is_an_error(peers):
    with pytest.raises(RuntimeError, match=r"moejax_side.py ended with 1"):
        peers.Worker(Path(sys.executable), "moejax_side.py", {})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([4.2, 3.0], [4.3, 3.0], r"losses differ by \[0.1 +0. *\] nats"),
        ([4.2, 3.0], [4.2, 3.1], r"losses differ by \[ *0. +0.1\] nats"),
        ([9.0, 3.0], [9.0, 3.0], r"the first loss is 9.000, not near log\(64\)"),
        ([4.2, 4.3], [4.2, 4.3], "the loss did not fall"),
        ([4.2, float("nan")], [4.2, 3.0], r"losses differ by \[ *0. +nan\] nats"),
    ],
)
def test_sides_that_are_no_comparison_are_refused(peers, first, second, message):
    with pytest.raises(RuntimeError, match=message):
        peers.check_losses(first, second, 64)
