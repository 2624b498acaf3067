"""Pods by their names, and what is missing to compile for them."""

import os

import pytest

from moejax import topology
from moejax.config import ConfigError
from moejax.topology import CHIPS, PEAK_BF16, parse_topology, start_compiler


@pytest.mark.parametrize(
    ("text", "chips", "rings"),
    [
        ("v5p:4x4x8", 128, [True, True, True]),
        ("v5p:2x2x4", 16, [False, False, True]),
        ("v5e:16x16", 256, [True, True]),
        ("v6e:4x8", 32, [False, False]),
        ("tpu7x:4x4x4", 64, [True, True, True]),
        ("v5p:4x4x8:2", 256, [True, True, True]),
        ("h100:16x8", 128, None),
    ],
)
def test_pods(text, chips, rings):
    pod = parse_topology(text)
    assert pod.num_chips == chips
    if rings is not None:
        assert [pod.wraps(dim) for dim in range(len(pod.shape))] == rings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "'v9' is not a chip that can be planned for; use one of v4, v5e"),
        ("v5p:4x4", "v5p needs 3 sizes of its torus, for example v5p:4x4x8"),
        ("v5e:4x", "v5e needs 2 sizes"),
        ("v5e:0x4", "v5e needs 2 sizes"),
        ("h100:8", "h100 needs hosts and GPUs of a host, for example h100:4x8"),
        ("v5p", "v5p needs 3 sizes"),
        ("v5p:2x2x2:0", "'0' is not a number of slices; give one as in v5p:4x4x8:2"),
        ("v5p:2x2x2:", "'' is not a number of slices"),
        ("v4:2x2x2:2", "the network between slices of v4 is not known; plan one slice"),
        ("h100:2x8:2", "slices are of TPUs; more hosts of GPUs are h100:HOSTSxGPUS"),
    ],
)
def test_no_such_pod(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


def test_a_program_has_the_part_of_a_gpu_that_jax_takes(monkeypatch):
    for name in (topology.GPU_FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert parse_topology("h100:1x8").memory == 84_942_979_072 * 3 // 4
    assert parse_topology("v5e:2x4").memory == CHIPS["v5e"].memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert parse_topology("h100:1x8").memory == 84_942_979_072 // 2
    monkeypatch.setenv(topology.GPU_FRACTION, ".9")
    assert parse_topology("h100:1x8").fraction == 0.9
    assert parse_topology("v5e:2x4").fraction == 1


@pytest.mark.parametrize("text", ["0", "1.5", "90%", "nan"])
def test_no_such_part_of_a_gpu(text, monkeypatch):
    monkeypatch.setenv(topology.GPU_FRACTION, text)
    with pytest.raises(ConfigError, match=f"XLA_CLIENT_MEM_FRACTION={text} .* use 0.9, or unset"):
        parse_topology("h100:1x8")


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x4", "plan-tpu"), ("h100:1x8", "plan-gpu")])
def test_a_missing_compiler_says_how_to_get_it(text, extra, monkeypatch):
    before = dict(os.environ)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'moejax\[{extra}\]'"):
        start_compiler(parse_topology(text))
    assert dict(os.environ) == before


def test_every_chip_can_be_recognized_by_its_devices():
    for chip in CHIPS.values():
        assert {PEAK_BF16[kind] for kind in chip.kinds} == {chip.flops}
        assert chip.is_tpu == (chip.clock is not None)
        assert chip.is_tpu or chip.network is not None


def test_clocks_are_those_that_google_gives():
    """1.05, 1.5, 1.75 and 1.75 GHz: FLOP/s over what the matrix units do in a cycle."""
    for name, clock in (("v4", 1.05e9), ("v5e", 1.5e9), ("v5p", 1.75e9), ("v6e", 1.75e9)):
        assert CHIPS[name].clock == pytest.approx(clock, rel=0.01)
