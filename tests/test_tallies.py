"""Numbers of the atlas, against tables small enough to count by hand."""

import math

import numpy as np
import pytest

from moejax.tallies import TokenCounts, agreement, experts_to_remove, information, same_choices


def test_information_of_domains_that_have_experts_of_their_own():
    count_de = np.array([[500, 500, 0, 0], [0, 0, 500, 500]])
    assert information(count_de) == pytest.approx(math.log(2), abs=2e-3)


def test_information_is_0_where_experts_ignore_domains_though_the_raw_number_is_not():
    random = np.random.default_rng(0)
    found, raw = [], []
    for seed in range(30):
        count_de = random.multinomial(60, np.full(8, 1 / 8), size=4)
        joint_de = count_de / count_de.sum()
        apart_de = joint_de.sum(1, keepdims=True) * joint_de.sum(0, keepdims=True)
        ratio_de = np.where(joint_de > 0, joint_de / apart_de, 1)
        raw.append((joint_de * np.log(ratio_de)).sum())
        found.append(information(count_de, seed))
    assert np.mean(raw) > 0.03
    assert abs(np.mean(found)) < 0.005


def test_a_domain_without_tokens_and_a_layer_without_choices():
    some = np.array([[5, 0], [0, 5]])
    assert information(np.vstack([some, [[0, 0]]])) == information(some)
    assert information(np.zeros((2, 3), int)) == 0


def test_top_tokens_by_hand():
    """Two experts, tokens 3, 5 and 7. Expert 0 took 3 four times, 5 twice; expert 1 5 and 7."""
    counts = TokenCounts(np.bincount([3] * 4 + [5] * 4 + [7] * 4, minlength=9), 1, 2)
    token_n = np.array([3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 1])
    expert_n = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0])  # 2 is none
    counts.add(token_n, np.arange(100, 113), expert_n[None, :, None])
    load_le = np.array([[6, 4]])
    ids, lift, count, place = counts.top(load_le)
    assert ids[0, 0].tolist() == [3] + [-1] * 11  # 5 is at 2 / (4 * 0.6) = 0.83, below chance
    assert ids[0, 1].tolist() == [7, 5] + [-1] * 10
    assert lift[0, 0, 0] == pytest.approx(4 / (4 * 0.6))
    assert lift[0, 1, :2].tolist() == pytest.approx([2 / (2 * 0.4), 2 / (4 * 0.4)])
    assert count[0, 1, :3].tolist() == [2, 2, 0]
    assert place[0, 0, 0] == 103
    assert place[0, 1, :3].tolist() == [109, 107, -1]


def test_only_the_most_frequent_tokens_are_counted_where_there_are_many(monkeypatch):
    monkeypatch.setattr("moejax.tallies.MOST_COUNTS", 8)
    counts = TokenCounts(np.array([5, 0, 9, 1, 7]), 2, 2)
    assert counts.id_v.tolist() == [2, 4]
    counts.add(np.array([0, 2, 4]), np.arange(3), np.array([[[0], [1], [0]]] * 2))
    assert counts.count_lve.sum() == 4


def test_experts_to_remove():
    load_le = np.array([[9, 1, 8, 0], [7, 2, 3, 4]])
    assert len(experts_to_remove(load_le, np.array([4, 4]), 8)) == 8
    assert experts_to_remove(load_le, np.array([2, 1]), 64) == [(0, 0), (0, 1), (1, 0)]
    some = experts_to_remove(load_le, np.array([4, 4]), 5)
    assert {(0, 0), (0, 2), (1, 0)} <= set(some)
    assert len(set(some)) == 5
    assert some == experts_to_remove(load_le, np.array([4, 4]), 5)
    assert experts_to_remove(load_le, np.array([4, 4]), 0) == []


def test_agreement_knows_renamed_experts():
    random = np.random.default_rng(0)
    a_lns = np.argsort(random.random((1, 500, 6)), axis=-1)[..., :2]
    renamed = np.array([4, 2, 0, 5, 1, 3])
    found = agreement(a_lns, renamed[a_lns][..., ::-1], 6)
    assert found.matched_l.tolist() == [1]
    assert found.match_le[0].tolist() == renamed.tolist()
    assert found.same_l[0] < 0.25
    assert found.chance_l[0] == pytest.approx(2 / 6, abs=0.01)
    itself = agreement(a_lns, a_lns, 6)
    assert (itself.same_l[0], itself.matched_l[0]) == (1, 1)


def test_same_choices_are_of_the_second():
    """Token 0 keeps one of its two experts, token 1 has one choice and keeps it."""
    a_lns, b_lns = np.array([[[0, 1], [2, 9]]]), np.array([[[1, 3, 9], [9, 9, 2]]])
    assert same_choices(a_lns, b_lns, 4).tolist() == pytest.approx([2 / 3])
    assert agreement(a_lns, b_lns, 4).same_l.tolist() == pytest.approx([2 / 3])
