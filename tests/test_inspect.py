"""Looking inside: what was planted is found, and texts that cannot be shown are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.corpus import load_corpus, make_corpus
from moejax.errors import ConfigError
from moejax.inspect import Inspector
from moejax.overrides import load_config
from moejax.state import split_model
from moejax.tallies import information
from moejax.tokenizer import ByteTokenizer

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


def test_embedded_text_is_the_default(planted):
    inspector, _, _ = planted
    expected = load_corpus(inspector.config.data, "validation").fingerprint
    assert inspector.corpus.fingerprint == expected
    assert dataclasses.is_dataclass(inspector.config)
