"""What a checkpoint remembers of where it was made, and what is said of a difference."""

import jax

from moejax.config import Config, MeshConfig
from moejax.environment import cpu_features, environment, environment_difference


def test_what_decides_the_last_bits_is_in_it(monkeypatch):
    jax.devices()  # XLA reads the variables once, at its start
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    found = environment(Config(), MeshConfig(data=2, expert=4))
    assert found["XLA_FLAGS"] == "--xla_a=1"
    assert (found["devices"], found["processes"]) == (8, 1)
    assert (found["mesh.data"], found["mesh.expert"], found["mesh.tensor"]) == (2, 4, 1)
    assert found["jax"] == jax.__version__
    assert found["cpu"]
    assert "hunter2" not in str(found), "of the environment two variables are stored"


def test_a_difference_is_said_with_both_values():
    before = {"devices": 8, "mesh.expert": 8, "jaxlib": "0.10.1", "gone": 1}
    now = {"devices": 4, "mesh.expert": 4, "jaxlib": "0.10.1", "new": 2}
    assert environment_difference(before, now) == ["devices: 8 -> 4", "mesh.expert: 8 -> 4"]
    assert environment_difference(before, before) == []
    assert environment_difference({}, now) == [], "a checkpoint of an older version"


def test_instruction_sets_of_a_machine(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name : x\nflags\t\t: fpu avx2 avx fma rdrand\nflags : avx512f\n")
    assert cpu_features(file).split()[1:] == ["avx", "avx2", "fma"]
    file.write_text("Features\t: fp asimd sve\n")
    assert cpu_features(file).split()[1:] == ["asimd", "sve"]
    assert len(cpu_features(tmp_path / "none").split()) == 1
