"""The atlas: what is saved comes back, and what is not an atlas is named."""

import dataclasses
import io
import json
import os

import numpy as np
import pytest

from moejax.atlas import PARTS, Atlas, Snippet, TokenView, load_atlas, save_atlas
from moejax.errors import ConfigError

L, E, D, W, S = 2, 3, 2, 2, 1


def atlas(**changes) -> Atlas:
    rng = np.random.default_rng(0)

    def counts(*shape):
        return rng.integers(0, 9, shape)

    def floats(*shape):
        return rng.random(shape).astype(np.float32)

    removed_le = floats(L, E)
    removed_le[1, 2] = np.nan
    view = TokenView(
        "a \u2028 view", ("a", " \ud7ff", "<"), counts(L, 3, 2), floats(L, 3, 2), floats(3)
    )
    fields = {
        "step": 7,
        "layers_l": np.array([1, 3]),
        "experts_l": np.array([3, 3]),
        "domains": ("books", 'a "quoted" <name>'),
        "tokens": 40,
        "load_dle": counts(D, L, E),
        "load_ple": counts(PARTS, L, E),
        "coactivation_lee": counts(L, E, E),
        "information_l": floats(L),
        "norm_le": floats(L, E),
        "removed_le": removed_le,
        "removed_own_le": removed_le,
        "removed_other_le": removed_le,
        "top_token_lew": np.array([4, 9, -1])[counts(L, E, W) % 3],
        "top_lift_lew": floats(L, E, W),
        "top_count_lew": counts(L, E, W),
        "text_ids_n": np.array([4, 9]),
        "top_text": ("\x00\n", "\N{SMILING FACE WITH OPEN MOUTH}"),
        "snippets": (Snippet(1, 2, "in its context", 3, 6),),
        "saturation_steps": np.array([5]),
        "saturation_sl": floats(S, L),
        "views": (view,),
        "notes": ("one",),
        "run": 2 * "01234567",
        "checkpoint": 4 * "89abcdef",
    }
    return Atlas(**(fields | changes))


def same(a, b):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        elif field.name == "views":
            assert len(left) == len(right)
            for one, other in zip(left, right, strict=True):
                same(one, other)
        else:
            assert (type(left), left) == (type(right), right), field.name


def test_what_is_saved_comes_back(tmp_path):
    file = tmp_path / "atlas" / "7.npz"
    save_atlas(atlas(), file)
    same(load_atlas(file), atlas())
    assert [path.name for path in file.parent.iterdir()] == ["7.npz"]


def test_without_earlier_checkpoints_and_texts(tmp_path):
    bare = atlas(
        saturation_steps=np.zeros(0, int), saturation_sl=np.zeros((0, 0)), views=(), snippets=()
    )
    assert bare.saturation_sl.shape == (0, L)
    save_atlas(bare, tmp_path / "a.npz")
    same(load_atlas(tmp_path / "a.npz"), bare)


def test_texts_by_id():
    assert atlas().text(4) == "\x00\n"
    with pytest.raises(KeyError, match="token 5 is none of the atlas's 2"):
        atlas().text(5)


def test_arrays_must_have_the_dims_of_their_names():
    with pytest.raises(ValueError, match=r"load_dle .*dims \[d, l, e\]"):
        atlas(load_dle=np.zeros((L, E)))
    with pytest.raises(ValueError, match=r"norm_le has shape \(2, 4\); e is 3 elsewhere"):
        atlas(norm_le=np.zeros((L, 4)))
    view = dataclasses.replace(atlas().views[0], loss_t=np.zeros(2))
    with pytest.raises(ValueError, match="loss_t"):
        atlas(views=(view,))


def test_a_file_that_is_no_atlas_is_named(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(ConfigError, match=r"a.npz does not exist; write it with `moejax inspect"):
        load_atlas(file)
    save_atlas(atlas(), file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", whole.replace(b"texts", b"tests")):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a.npz is not an atlas that can be read"):
            load_atlas(file)


def test_a_link_is_not_followed_and_no_pipe_is_waited_for(tmp_path):
    save_atlas(atlas(), tmp_path / "a.npz")
    (tmp_path / "b.npz").symlink_to("a.npz")
    os.mkfifo(tmp_path / "c.npz")
    (tmp_path / f".d.npz.{os.getpid()}").symlink_to("precious")
    for name, why in (("b", "it is a link"), ("c", "it is no file")):
        with pytest.raises(ConfigError, match=rf"{name}.npz is not an atlas .*{why}"):
            load_atlas(tmp_path / f"{name}.npz")
    with pytest.raises(ConfigError, match="symbolic links"):
        save_atlas(atlas(), tmp_path / "d.npz")
    assert not (tmp_path / "precious").exists()


def test_another_format_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    save_atlas(atlas(), file)
    with np.load(file) as stored:
        entries = dict(stored)
    texts = json.loads(entries["texts"].tobytes()) | {"format": 0}
    entries["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, **entries)
    file.write_bytes(stream.getvalue())
    with pytest.raises(ConfigError, match="it has format 0, and this reads 2"):
        load_atlas(file)
