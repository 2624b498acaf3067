"""Looking inside: against the oracle, against what was planted, and on a model that was trained."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import moe, reference
from moejax.atlas import load_atlas
from moejax.cli import main
from moejax.corpus import load_corpus, make_corpus
from moejax.errors import ConfigError
from moejax.inspect import Inspector, agreement_of_workdirs, context, pieces, token_text
from moejax.mesh import make_mesh
from moejax.metrics import read_metrics
from moejax.moe_config import MoEConfig
from moejax.overrides import apply_overrides, load_config
from moejax.parameters import moe_parameters
from moejax.router_state import initial_router_state
from moejax.routing import KEEP, RouterInputs
from moejax.state import split_model
from moejax.tallies import information
from moejax.tokenizer import ByteTokenizer
from moejax.workdir import read_config

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


# Planted specialisation: a router whose weights are set by hand

CLASSES = ("aeiou", "bcdfghjklmnpqrstvwxyz", " \n", None)  # None: all other bytes
SMALL = [
    *("model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=8", "moe.num_experts=4", "moe.expert_hidden=8", "data.sequence_length=32"),
    *("train.batch_size=8", "eval.batches=4", "moe.top_k=1", "moe.normalize_weights=False"),
]
PLANTED_MOE = SMALL[-2:]


def _class_of_token(classes=CLASSES) -> np.ndarray:
    class_v = np.full(264, classes.index(None))
    for number, letters in enumerate(classes):
        if letters is not None:
            class_v[np.frombuffer(letters.encode(), np.uint8)] = number
    return class_v


def _planted(config, mesh, class_v):
    """Returns parameters with which each token goes to the expert of its class, in every layer.

    An embedding is the direction of its class, attention and experts add nothing, and the router
    takes the direction.
    """
    _, params = split_model(config, mesh, jax.random.key(0))
    embedding = np.eye(16, dtype=np.float32)[class_v[: config.model.vocab_size]]
    layer = params["runs"]["layer_0"]
    layer["attention"]["output"] = jnp.zeros_like(layer["attention"]["output"])
    layer["moe"]["down"] = jnp.zeros_like(layer["moe"]["down"])
    router_lde = np.broadcast_to(np.eye(16, 4, dtype=np.float32), layer["moe"]["router"].shape)
    layer["moe"]["router"] = jnp.asarray(router_lde)
    params["embedding"] = jnp.asarray(embedding)
    return params


@pytest.fixture(scope="module")
def planted(mesh):
    config = load_config("configs/quickstart.py", SMALL)
    params = _planted(config, mesh, _class_of_token())
    inspector = Inspector(config, mesh)
    return inspector, params, inspector.atlas(3, params, {})


def test_planted_tokens_are_recovered(planted):
    """On the quickstart's text: each expert's tokens are those that were planted, and no others."""
    inspector, _, atlas = planted
    class_v = _class_of_token()
    batches = [inspector._batches.rows(i) for i in range(4)]
    token_n = np.concatenate([b.tokens[b.segments > 0] for b in batches])
    frequency_v = np.bincount(token_n, minlength=264)
    for layer, expert in np.ndindex(2, 4):
        mine = np.flatnonzero((class_v == expert) & (frequency_v > 0))
        expected = mine[np.argsort(-frequency_v[mine], kind="stable")][:12]
        kept = atlas.top_token_lew[layer, expert]
        assert kept[kept >= 0].tolist() == expected.tolist()
        found = atlas.top_count_lew[layer, expert][: len(expected)]
        assert found.tolist() == frequency_v[expected].tolist()
        lift = len(token_n) / frequency_v[mine].sum()
        assert atlas.top_lift_lew[layer, expert][: len(expected)] == pytest.approx(lift, rel=1e-5)
    assert atlas.tokens == len(token_n)
    assert [atlas.text(token) for token in (10, 32)] == ["\n", " "]


def test_planted_loads_by_domain_and_part_are_counted_by_hand(planted):
    inspector, _, atlas = planted
    corpus, class_v = inspector.corpus, _class_of_token()
    load_de, load_pe = np.zeros((3, 4), int), np.zeros((10, 4), int)
    length = inspector.config.data.sequence_length
    for index in range(4):
        for row in range(8):
            first = inspector._batches.first_token(index, row)
            for position in range(first, first + length):
                document = next(
                    d for d in range(corpus.num_documents) if position < corpus.start_d[d + 1]
                )
                start, stop = corpus.start_d[document : document + 2]
                expert = class_v[corpus.token_n[position]]
                load_de[corpus.domain_d[document], expert] += 1
                load_pe[(position - start) * 10 // (stop - start), expert] += 1
    for layer in range(2):
        np.testing.assert_array_equal(atlas.load_dle[:, layer], load_de)
        np.testing.assert_array_equal(atlas.load_ple[:, layer], load_pe)
        np.testing.assert_array_equal(atlas.coactivation_lee[layer], np.diag(load_de.sum(0)))
        assert atlas.information_l[layer] == information(load_de)
    assert (load_de > 0).sum() > 8


def test_planted_snippets_show_the_token_in_its_place(planted):
    _, _, atlas = planted
    class_v = _class_of_token()
    shown = iter(atlas.snippets)
    for layer, expert in np.ndindex(2, 4):
        for token in atlas.top_token_lew[layer, expert, :3]:
            if token < 0:  # of spaces there are two kinds
                continue
            snippet = next(shown)
            assert (snippet.layer, snippet.expert) == (layer, expert)
            marked = snippet.text[snippet.start : snippet.end]
            if token < 128:
                assert marked == atlas.text(int(token))
            else:  # a byte of a character, which is shown whole
                assert token in marked.encode()
                assert len(marked) == 1
            assert class_v[token] == expert
    assert list(shown) == []
    assert len(atlas.snippets) == 2 * (3 * 3 + 2)


def test_experts_that_give_nothing_cost_nothing(planted):
    _, _, atlas = planted
    assert (atlas.norm_le == 0).all()
    assert (atlas.removed_le == 0).all()
    assert (atlas.removed_own_le == 0).all()


def test_the_views_are_texts_of_the_domains(planted):
    inspector, params, atlas = planted
    assert {view.name for view in atlas.views} == set(atlas.domains)
    class_v = _class_of_token()
    view = inspector.view(params, {}, ByteTokenizer().encode("Ab é"), "mine")
    assert view.tokens == ("A", "b", " ", "é", "")
    assert view.expert_ltk[..., 0].tolist() == [class_v[[65, 98, 32, 195, 169]].tolist()] * 2
    assert np.isnan(view.loss_t).tolist() == [True] + [False] * 4
    # softmax over a normed one-hot of 16: the direction's length is 4
    weight = np.exp(4) / (np.exp(4) + 3)
    assert view.weight_ltk == pytest.approx(weight, rel=1e-4)


def test_domains_with_experts_of_their_own_have_all_information(mesh):
    """Three domains with letters of their own: what was planted is log 3, less the ends."""
    config = load_config("configs/quickstart.py", [*SMALL[:-3], *PLANTED_MOE])
    classes = ("abcd", "efgh", "ijkl", None)
    random = np.random.default_rng(0)
    documents = [
        (d, random.choice(np.frombuffer(classes[d].encode(), np.uint8), 255).astype(np.int32))
        for _ in range(4)
        for d in range(3)
    ]
    corpus = make_corpus(documents, ("x", "y", "z"), ByteTokenizer())
    params = _planted(config, mesh, _class_of_token(classes))
    atlas = Inspector(config, mesh, corpus).atlas(0, params, {}, remove=0)
    assert atlas.information_l == pytest.approx(np.log(3), abs=0.02)
    expected_de = np.full((3, 4), 0)
    expected_de[[0, 1, 2], [0, 1, 2]] = 4 * 255
    expected_de[:, 3] = 4  # the ends of documents
    np.testing.assert_array_equal(atlas.load_dle[:, 0], expected_de)
    assert np.isnan(atlas.removed_le).all()
    assert "0 of 8 experts were left out" in atlas.notes[0]


# Errors and texts


def test_a_model_without_experts_is_refused(mesh):
    config = load_config("configs/quickstart_dense.py")
    with pytest.raises(ConfigError, match=r"no MoE layer .*give the workdir of a run"):
        Inspector(config, mesh)


def test_texts_without_tokens_and_too_long_ones_are_refused(planted):
    inspector, params, _ = planted
    with pytest.raises(ConfigError, match="has no token; give at least one character"):
        inspector.view(params, {}, np.zeros(0, np.int32), "")
    with pytest.raises(ConfigError, match=r"33 tokens .* data.sequence_length=32; give a shorter"):
        inspector.view(params, {}, np.zeros(33, np.int32), "long")


def test_pieces_are_the_text():
    tokenizer = ByteTokenizer()
    for text in ("plain", "ñandú 🙂!", "\x00\n"):
        ids = tokenizer.encode(text)
        found = pieces(tokenizer, ids)
        assert "".join(found) == text
        assert len(found) == len(ids)
    assert pieces(tokenizer, tokenizer.encode("ñx")) == ("ñ", "", "x")


def test_context_marks_the_token():
    tokenizer = ByteTokenizer()
    ids = np.append(tokenizer.encode("x" * 80 + "señor" + "y" * 80), tokenizer.end_of_document)
    for at, marked in ((80, "s"), (82, "ñ"), (83, "ñ"), (84, "o"), (166, "<end of document>")):
        text, start, end = context(tokenizer, ids, at)
        assert text[start:end] == marked
        assert start == min(60, at) or at > 82
        assert len(text) <= 60 + 17 + 40
    assert [token_text(tokenizer, token) for token in (97, 0xC3)] == ["a", "<0xC3>"]


def test_embedded_text_is_the_default(planted):
    inspector, _, _ = planted
    expected = load_corpus(inspector.config.data, "validation").fingerprint
    assert inspector.corpus.fingerprint == expected
    assert dataclasses.is_dataclass(inspector.config)


# A model that was trained, by the command line


TRAINED = [
    *("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "moe.num_experts=4", "moe.expert_hidden=32", "data.sequence_length=64"),
    *("train.batch_size=8", "train.steps=150", "checkpoint.every=50", "checkpoint.keep=3"),
    *("eval.batches=8", "eval.every=150", "logging.every=50", "optim.learning_rate=0.01"),
    *("mesh.data=1", "mesh.expert=1"),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on one device, which `inspect` uses too."""
    workdir = tmp_path_factory.mktemp("inspect") / "run"
    words = ["configs/quickstart.py", "--workdir", str(workdir), *TRAINED]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("loop", "evaluate"):
            make = functools.partial(make_mesh, devices=jax.devices()[:1])
            patch.setattr(
                f"moejax.{module}.make_mesh", lambda sizes, _=None, make=make: make(sizes)
            )
        assert main(["train", *words]) == 0
        yield workdir


@pytest.fixture(scope="module")
def written(workdir):
    file = workdir / "atlas.json"
    assert main(["inspect", "--workdir", str(workdir), "--json", str(file)]) == 0
    return load_atlas(workdir / "atlas" / "150.npz"), json.loads(file.read_text())


@pytest.mark.slow
def test_removing_an_expert_costs_its_own_tokens_most(written):
    atlas, _ = written
    load_le = atlas.load_dle.sum(0)
    used_le = load_le > 0.02 * load_le.sum(1, keepdims=True)
    assert used_le.sum() >= 6
    own_le, other_le = atlas.removed_own_le, atlas.removed_other_le
    assert (own_le[used_le] > other_le[used_le]).mean() >= 0.75
    # the first layer carries most of so small a model
    assert (own_le[0] > 0.05).all()
    assert (own_le[0] > 5 * np.abs(other_le[0])).all()
    assert (atlas.norm_le[used_le] > 0).all()
    # the last layer reaches no other token's loss
    np.testing.assert_allclose(atlas.removed_other_le[1], 0, atol=1e-6)


def test_parts_of_the_loss_add_up(written):
    """What is lost over all tokens is the mean over those that take an expert and the others."""
    atlas, _ = written
    low = np.minimum(atlas.removed_own_le, atlas.removed_other_le) - 1e-6
    high = np.maximum(atlas.removed_own_le, atlas.removed_other_le) + 1e-6
    assert ((low <= atlas.removed_le) & (atlas.removed_le <= high)).all()


def test_counts_agree_with_each_other_and_with_evaluation(workdir, written):
    atlas, _ = written
    load_le = atlas.load_dle.sum(0)
    assert (load_le.sum(1) == 2 * atlas.tokens).all()
    np.testing.assert_array_equal(atlas.load_ple.sum(0), load_le)
    np.testing.assert_array_equal(np.diagonal(atlas.coactivation_lee, axis1=1, axis2=2), load_le)
    off_le = atlas.coactivation_lee.sum(2) - load_le
    np.testing.assert_array_equal(off_le, load_le)  # top 2: one other expert each time
    record = [r for r in read_metrics(workdir) if r["split"] == "eval"][-1]
    share_le = load_le / load_le.sum(1, keepdims=True)
    np.testing.assert_allclose(share_le, record["expert_load"], atol=1e-6)


def test_saturation_is_of_the_earlier_checkpoints(written):
    atlas, _ = written
    assert atlas.saturation_steps.tolist() == [50, 100]
    assert ((atlas.saturation_sl > 0.2) & (atlas.saturation_sl < 1)).all()


def test_the_json_says_what_the_atlas_does(written):
    atlas, record = written
    assert record["tokens"] == atlas.tokens
    assert len(record["experts"]) == 8
    last = record["experts"][-1]
    assert (last["layer"], last["expert"]) == (1, 3)
    assert last["removed_own"] == pytest.approx(float(atlas.removed_own_le[1, 3]))
    assert last["assignments"] == atlas.load_dle[:, 1, 3].sum()
    assert list(record["saturation"]) == ["50", "100"]


def test_a_text_is_shown_token_by_token(workdir, tmp_path, capsys):
    files = ["--json", str(tmp_path / "t.json"), "--png", str(tmp_path / "t.png")]
    text = "Señor $x_1$ [b] " * 3 + "漢"  # 54 tokens; nothing of it is markup
    assert main(["inspect", "--workdir", str(workdir), "--text", text, *files]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert "".join(record["tokens"]) == text
    assert record["loss"][0] is None
    assert min(record["loss"][1:]) > 0
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    for layer in record["layers"]:
        assert {len(row) for row in layer["experts"]} == {2}
        assert np.sum(layer["weights"], axis=1) == pytest.approx(1, rel=1e-5)
        assert all(a >= b for a, b in layer["weights"])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "step 150" in capsys.readouterr().out


def test_two_steps_of_one_run_are_compared(workdir, tmp_path, capsys):
    file = tmp_path / "agreement.json"
    line = ["inspect", "--workdir", str(workdir), "--against", str(workdir), "--json", str(file)]
    assert main([*line, "--step", "50", "--against_step", "150"]) == 0
    record = json.loads(file.read_text())
    assert record["steps"] == [50, 150]
    atlas = load_atlas(workdir / "atlas" / "150.npz")
    assert record["same"] == pytest.approx(atlas.saturation_sl[0].tolist(), rel=1e-5)
    assert main([*line, "--step", "150"]) == 0
    assert json.loads(file.read_text())["same"] == [1, 1]
    assert "by chance" in capsys.readouterr().out


def test_other_layers_and_other_tokens_are_not_compared(workdir, monkeypatch):
    config = read_config(workdir)
    other = apply_overrides(config, ["model.num_layers=3"])
    compare = functools.partial(agreement_of_workdirs, config, workdir, None)
    with pytest.raises(ConfigError, match=r"has 2 MoE layers and .* 3; routing is compared layer"):
        compare(other, Path("b"), None)
    names = types.SimpleNamespace
    monkeypatch.setattr("moejax.inspect.load_tokenizer", lambda name: names(fingerprint=name))
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="b.json"))
    with pytest.raises(ConfigError, match="do not see the same tokens; compare runs of one"):
        compare(other, Path("b"), None)


def test_inspecting_an_empty_workdir_says_what_is_missing(workdir, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    assert main(["inspect", "--workdir", str(tmp_path)]) == 2
    assert "holds no checkpoint; train first" in capsys.readouterr().err
