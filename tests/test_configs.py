"""Every shipped config is valid, fits the devices that its docstring names, and is what it says."""

from pathlib import Path

import pytest

from moejax.config import ConfigError, MeshConfig
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.overrides import load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name: str, *overrides: str):
    return load_config(str(CONFIGS / f"{name}.py"), overrides)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_config_fits_up_to_eight_devices(file, devices):
    config = load(file.stem)
    config.check_mesh(config.mesh.resolve(devices))


def test_dense_baseline_costs_no_less_and_sees_the_same():
    """At least the MoE's FLOPs per token, at most 1% more; the same data, steps and optimizer."""
    moe, dense = load("quickstart"), load("quickstart_dense")
    assert 1 <= flops_per_token(dense) / flops_per_token(moe) < 1.01
    assert active_parameters(moe) == pytest.approx(active_parameters(dense), rel=0.01)
    assert total_parameters(moe) > 4 * total_parameters(dense)
    assert (moe.data, moe.train, moe.optim, moe.eval, moe.seed) == (
        dense.data,
        dense.train,
        dense.optim,
        dense.eval,
        dense.seed,
    )


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"expert": 3}, r"moe.num_experts=16 is not divisible by the expert axis \(3\); use a"),
        ({"tensor": 4}, r"model.num_kv_heads=2 is not divisible by the tensor axis \(4\)"),
        ({"fsdp": 3}, r"model.d_model=128 is not divisible by the fsdp axis \(3\)"),
        (
            {"data": 16},
            r"microbatches of 8 sequences, not a multiple of 16 = data 16 "
            r".*use train.batch_size=16",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, **mesh}
    with pytest.raises(ConfigError, match=message):
        load("quickstart").check_mesh(MeshConfig(**sizes))


def test_not_enough_devices():
    with pytest.raises(ConfigError, match=r"needs 8 devices \(available: 4\); .*--cpu_devices 8"):
        MeshConfig(data=2, expert=4).resolve(4)
    message = r"uses 2 devices \(available: 4\); .*set one axis to None"
    with pytest.raises(ConfigError, match=message):
        MeshConfig(data=2).resolve(4)
