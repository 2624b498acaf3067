"""Values, keys and files: what a user can write, and what they are told when it is wrong."""

import ast
import contextlib
import dataclasses
import json
import re
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from moejax import overrides
from moejax.config import Config, ConfigError, MoEConfig, TrainConfig, default_config
from moejax.overrides import (
    Key,
    apply_overrides,
    config_difference,
    config_from_json,
    config_to_dict,
    config_to_json,
    config_values,
    keys,
    load_config,
    parse_value,
)

LISTS = Key("model.widths", tuple[int, ...], (1, 2))
NAMES = Key("data.names", tuple[str, ...] | None, None)


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write_config(body: str, name: str = "x.py") -> str:
        file = tmp_path / name
        file.write_text(f"from moejax.config import default_config\n{body}")
        return str(file)

    return write_config


def test_every_key_has_a_comment_that_help_shows():
    comments = {key.name: key.comment for key in keys().values()}
    assert [name for name, comment in comments.items() if not comment] == []
    assert comments["optim.learning_rate"] == "the peak, at the end of warmup", "behind the field"
    assert comments["moe.priority"].startswith("who gets a slot first; "), "above the field"
    assert comments["moe.shared_experts"].startswith("that see every token"), "no title of a group"


def set_key(assignment: str) -> object:
    name = assignment.partition("=")[0]
    return config_values(apply_overrides(Config(), [assignment]))[name]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.steps=1e4", 10_000),
        ("train.steps=1_000", 1000),
        ("train.steps=5.0", 5),
        ("seed=7", 7),
        ("optim.learning_rate=1", 1.0),
        ("optim.learning_rate=3e-4", 3e-4),
        ("moe.capacity_factor=None", None),
        ("moe.capacity_factor=none", None),
        ("moe.every=None", None),
        ("moe.capacity_by_expert=None", None),
        ("moe.capacity_by_expert=1,2,1,2,1,2,1,0.5", (1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.5)),
        ("eval.batches=4", 4),
        ("model.tie_embeddings=true", True),
        ("model.qk_norm=False", False),
        ("moe.router=sigmoid_bias", "sigmoid_bias"),
        ("moe.router='sigmoid_bias'", "sigmoid_bias"),
        ("data.tokenizer=a=b.json", "a=b.json"),
        ('data.tokenizer="None"', "None"),
        ("data.tokenizer=12", "12"),
        ("data.tokenizer='", "'"),
    ],
)
def test_a_value_takes_its_keys_type(assignment, expected):
    value = set_key(assignment)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ["(3,4)", "[3, 4]", "3,4", "3e0,4", "(3,4,)"])
def test_tuples_and_lists_survive(text):
    assert parse_value(text, LISTS) == (3, 4)


def test_lists_of_one_of_none_and_of_names():
    assert parse_value("3", LISTS) == (3,)
    assert parse_value("()", LISTS) == ()
    assert parse_value("en, es", NAMES) == ("en", "es")
    assert parse_value("['a,b']", NAMES) == ("a,b",)
    assert parse_value("None", NAMES) is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "train.steps=many",
            "train.steps='many' is not a whole number; for example train.steps=1000",
        ),
        ("train.steps=1.5", "train.steps=1.5 is not a whole number; for example train.steps=1000"),
        ("train.steps=True", "train.steps='True' is not a whole number"),
        ("train.steps=None", "train.steps='None' is not a whole number"),
        ("train.steps=inf", "train.steps=inf is not a whole number"),
        ("train.steps=1e300", "train.steps=1e+300 is not a whole number"),
        (f"train.steps={'9' * 5000}", "train.steps=inf is not a whole number"),
        ("moe.every=x", "moe.every='x' is not a whole number or None"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan is not a finite number"),
        ("optim.clip_norm=inf", "optim.clip_norm=inf is not a finite number or None"),
        (
            "model.qk_norm=1",
            "model.qk_norm='1' is not true or false; for example model.qk_norm=True",
        ),
        ("moe.router=topk", "moe.router='topk' is not one of softmax, sigmoid, sqrt_softplus"),
        ("data.tokenizer=a\nb", r"data.tokenizer='a\nb' is not a string"),
        ("data.path=", "data.path has no value; for example data.path=data/mine"),
        ("train.steps", "'train.steps' is not key=value; for example train.steps=1000"),
        ("train=5", "train is a section; set one of its keys: train.steps, train.batch_size, "),
        ("=5", "unknown key ''"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_asked(assignment, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [assignment])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigError, match=r"'x+\.\.\. is not a whole number") as caught:
        apply_overrides(Config(), ["train.steps=" + "x" * 10_000])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["[" * 10_000, "1," * 3 + "x", "(1, 'a')", "{}", "1e999"])
def test_a_wrong_list_is_an_error_too(text):
    with pytest.raises(ConfigError, match="is not a list, each a whole number"):
        parse_value(text, LISTS)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optim.learning_rate"),
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("model.num_expert", "moe.num_experts"),
        ("model.top_k", "moe.top_k"),
        ("sead", "seed"),
        ("every", "moe.every or checkpoint.every or eval.every or logging.every"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(key, meant):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [f"{key}=1"])
    assert str(caught.value) == f"unknown key {key!r}; did you mean {meant}?"


def test_a_key_unlike_any_other_gets_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), ["zzz=1"])
    assert str(caught.value) == "unknown key 'zzz'"


def test_a_key_given_twice_is_an_error_even_with_equal_values():
    with pytest.raises(ConfigError, match=r"^seed is given twice, as 1 and as 1; give it once$"):
        apply_overrides(Config(), ["seed=1", "seed=1"])


def test_only_the_resolved_values_are_validated_together(write):
    file = write("def get_config():\n c = default_config()\n c.moe.top_k = 1\n return c")
    with pytest.raises(ConfigError, match="the router gets no gradient"):
        load_config(file)
    assert load_config(file, ["moe.normalize_weights=false"]).moe.top_k == 1


def test_precedence_is_defaults_file_argument_command_line(write):
    file = write(
        "def get_config(arg=None):\n"
        " c = default_config()\n"
        " c.train.steps, c.seed, c.optim.warmup_steps = 20, 21, 22\n"
        " if arg: c.seed, c.optim.warmup_steps = int(arg), int(arg)\n"
        " return c"
    )
    config = load_config(f"{file}:30", ["optim.warmup_steps=40"])
    assert config.train.batch_size == TrainConfig().batch_size
    assert (config.train.steps, config.seed, config.optim.warmup_steps) == (20, 30, 40)


@pytest.mark.parametrize(
    "body",
    [
        "def get_config(): return {'train': {'steps': 1e1}}",
        "def get_config(arg): return {'train': {'steps': 10}} if arg is None else 1 / 0",
        "from moejax.config import *\ndef get_config(): return Config(train=TrainConfig(steps=10))",
        "from moejax.config import *\ndef get_config(): return {'train': TrainConfig(steps=10)}",
        "import numpy\ndef get_config(): return {'train': {'steps': numpy.int64(10)}}",
        "from base import get_config",
    ],
)
def test_what_get_config_may_return(write, body):
    write("def get_config():\n c = default_config()\n c.train.steps = 10\n return c", "base.py")
    assert load_config(write(body)) == Config(train=TrainConfig(steps=10))


def test_an_argument_reaches_get_config_whole(write):
    file = write("def get_config(arg):\n raise KeyError(arg)")
    with pytest.raises(ConfigError, match=r"KeyError: 'a=b.py:c, d'$"):
        load_config(f"{file}:a=b.py:c, d")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "c = default_config()\nc.optim.lr = 1",
            "{}, line 3: unknown key 'lr'; did you mean optim.l",
        ),
        ("c = default_config()\nc.optim.lr", "{}, line 3: unknown key 'lr'; did you mean optim.l"),
        ("c = default_config()\nc.moe.update(top=3)", "{}, line 3: unknown key 'top'"),
        ("def get_config():\n return {'moe': {'topk': 2}}", "{}: unknown key 'moe.topk'; did you"),
        (
            "def get_config():\n return {'moe': 2}",
            "{}: moe is a section; set one of its keys: moe.r",
        ),
        ("def get_config():\n return {'seed': '1'}", "{}: seed='1' is not a whole number"),
        ("def get_config():\n return {'seed': True}", "{}: seed=True is not a whole number"),
        ("def get_config():\n return {'seed': [1]}", "{}: seed=[1] is not a whole number"),
        ("def get_config():\n return 3", "{}: get_config returned int; return default_config() w"),
        ("def get_config():\n return 1 / 0", "{}, line 3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "{}, line 3: SystemExit: 3"),
        (
            "import nothing_there",
            "{}, line 2: ModuleNotFoundError: No module named 'nothing_there'",
        ),
        ("def get_config(:", "{}, line 2: SyntaxError: invalid syntax"),
        ("get_config = 3", "{} does not define get_config(arg)"),
        (
            "from moejax.config import TrainConfig\nTrainConfig(steps=0)",
            "{}, line 3: train.steps=0 is below 1",
        ),
    ],
)
def test_errors_of_a_file_name_it_and_its_line(write, body, message):
    file = write(body)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(message.format(file))
    assert "\n" not in str(caught.value)


def test_an_argument_that_get_config_does_not_take_is_refused(write):
    file = write("def get_config():\n return default_config()")
    with pytest.raises(
        ConfigError, match=r"takes no argument, and 'big' was given; use .*x\.py alone"
    ):
        load_config(f"{file}:big")


def test_a_file_that_is_not_there_gets_a_suggestion(write, tmp_path):
    file = write("", "quickstart.py")
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "quikstart.py"))
    assert str(caught.value).endswith(f"quikstart.py does not exist; did you mean {file}?")
    with pytest.raises(ConfigError, match=r"'configs' is not a Python file"):
        load_config("configs")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read: .*Is a directory"):
        load_config(str(tmp_path / "folder.py"))
    (tmp_path / "latin.py").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match=r"cannot be read: .*can't decode byte 0xff"):
        load_config(str(tmp_path / "latin.py"))


def test_loading_leaves_nothing_behind(write, tmp_path):
    path = list(sys.path)
    load_config(write("def get_config(): return default_config()"))
    assert sys.path == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.py"]


def test_default_config_has_the_keys_of_the_dataclasses():
    assert isinstance(default_config(), ConfigDict)
    assert overrides.build_config(overrides._checked(default_config().to_dict())) == Config()
    assert list(config_values(Config())) == list(overrides.keys())


# Round trips

LEARNING_RATES = st.floats(min_value=0, max_value=1e3)
COUNTS = st.integers(min_value=1, max_value=2**31 - 1)
TEXTS = st.text(min_size=1).filter(str.isprintable)


@settings(deadline=None)  # the machine is shared
@given(LEARNING_RATES, COUNTS, st.none() | st.floats(min_value=1e-3, max_value=1e3), TEXTS)
def test_json_and_the_command_line_give_the_same_config_back(rate, steps, factor, tokenizer):
    words = [
        f"optim.learning_rate={rate!r}",
        f"train.steps={steps}",
        f"moe.capacity_factor={factor}",
    ]
    config = apply_overrides(Config(), [*words, f"data.tokenizer={tokenizer!r}"])
    assert (config.optim.learning_rate, config.train.steps) == (rate, steps)
    assert (config.moe.capacity_factor, config.data.tokenizer) == (factor, tokenizer)
    assert config_from_json(config_to_json(config)) == config


@settings(deadline=None)  # the machine is shared
@given(st.text(), st.sampled_from(list(overrides.keys())))
def test_any_text_is_a_value_or_a_config_error(text, name):
    with contextlib.suppress(ConfigError):
        config = apply_overrides(Config(), [f"{name}={text}"])
        assert config_from_json(config_to_json(config)) == config


@settings(deadline=None)  # the machine is shared
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_any_json_is_a_config_or_a_config_error(value):
    for stored in (value, {"format": 1, "config": value}, {"format": 1, "config": {"seed": value}}):
        with contextlib.suppress(ConfigError):
            config_from_json(json.dumps(stored))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("3", "not a config of format 1 but of format None"),
        ('{"format": 2, "config": {}}', "not a config of format 1 but of format 2"),
        (
            '{"format": 1, "config": {"moe": {"topk": 1}}}',
            "unknown key 'moe.topk'; did you mean moe.top",
        ),
        ('{"format": 1, "config": {"seed": NaN}}', "seed=nan is not a whole number"),
    ],
)
def test_stored_configs_are_read_strictly(text, message):
    with pytest.raises(ConfigError) as caught:
        config_from_json(text)
    assert str(caught.value).startswith(message)


def test_a_key_that_an_older_version_did_not_know_takes_its_default():
    stored = {"format": 1, "config": config_to_dict(Config(seed=3))}
    del stored["config"]["moe"]["transport"]
    assert config_from_json(json.dumps(stored)) == Config(seed=3)


@pytest.mark.parametrize(
    "words",
    [
        ("optim.schedule=constant", "optim.final_fraction=1.0"),
        ("optim.name=lion", "optim.eps=0.5", "optim.schedule=constant", "optim.final_fraction=0"),
        ("moe.router=hash", "moe.balance_loss_weight=0.02", "moe.balance_convention=switch"),
        ("moe.zero_computation_weight=0.5",),
        ("moe.every=None", "logging.choices=True", "train.replay=there"),
    ],
)
def test_a_run_of_an_older_version_is_read_without_keys_that_it_ignored(words):
    """To refuse them would leave its checkpoints to nobody: their configs cannot be changed."""
    with pytest.raises(ConfigError):
        apply_overrides(Config(), words)
    chosen = [w for w in words if w.split("=")[0] in ("optim.schedule", "optim.name")]
    chosen += [w for w in words if w.split("=")[0] in ("moe.router", "moe.every")]
    stored = config_to_dict(Config())
    for word in words:
        section, key, text = re.split("[.=]", word, maxsplit=2)
        stored[section][key] = parsed(text)
    read = config_from_json(json.dumps({"format": 1, "config": stored}))
    assert read == apply_overrides(Config(), chosen)


def parsed(text: str):
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def test_config_difference_names_dotted_keys_with_both_values():
    other = dataclasses.replace(Config(), moe=MoEConfig(num_experts=4), seed=1)
    assert config_difference(Config(), other) == [("moe.num_experts", 8, 4), ("seed", 0, 1)]
    assert config_difference(other, other) == []


def test_configs_of_two_folders_may_import_siblings_of_one_name(tmp_path):
    for steps in (3, 4):
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "base.py").write_text(f"STEPS = {steps}\n")
        (folder / "run.py").write_text(
            "from base import STEPS\nfrom moejax.config import default_config\n\n\n"
            "def get_config():\n    config = default_config()\n    config.train.steps = STEPS\n"
            "    return config\n"
        )
        assert load_config(str(folder / "run.py")).train.steps == steps
    assert "base" not in sys.modules


def test_a_wrong_list_is_answered_with_a_list():
    message = r"moe.capacity_by_expert=.* is not a list, .*; for example .*_expert=1.0,2.0$"
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), ["moe.capacity_by_expert=much"])


def test_a_name_without_end_is_not_compared_with_all_keys():
    start = time.monotonic()
    with pytest.raises(ConfigError, match="unknown key 'xx"):
        overrides.read_overrides(["x" * 100_000 + "=1"])
    assert time.monotonic() - start < 5, "comparing takes minutes"
