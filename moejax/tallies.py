"""What the atlas is made of: counts of choices in, numbers out. No JAX.

Letters of dims are those of `atlas.py`.
"""

import dataclasses

import numpy as np

from moejax.atlas import TOP

SHUFFLES = 16  # tables over which chance is averaged
MOST_COUNTS = 1 << 25  # of tokens by layer and expert, that are held at once


def information(count_de: np.ndarray, seed: int = 0) -> float:
    """Returns the mutual information of domain and expert, nats, less what chance would give.

    The mutual information of a table of counts is above 0 also where experts ignore domains, the
    more so the fewer tokens there are. Chance is the mean over `SHUFFLES` tables with the same
    sums of rows and columns, drawn as if the domains of the assignments were shuffled. The result
    is 0 on average where nothing is learned of domains, and may be slightly below.

    Args:
        count_de: int [D, E]; assignments.
    """
    random = np.random.default_rng(seed)
    count_de = count_de[count_de.sum(1) > 0].astype(np.int64)
    tables = [_shuffled(count_de, random) for _ in range(SHUFFLES)]
    chance = np.mean([_mutual_information(table_de) for table_de in tables])
    return float(_mutual_information(count_de) - chance)


def _mutual_information(count_de: np.ndarray) -> float:
    joint_de = count_de / max(count_de.sum(), 1)
    apart_de = joint_de.sum(1, keepdims=True) * joint_de.sum(0, keepdims=True)
    here_de = joint_de > 0
    return float(np.sum(joint_de[here_de] * np.log(joint_de[here_de] / apart_de[here_de])))


def _shuffled(count_de: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns a table with the same sums: each domain draws its assignments from what is left."""
    left_e = count_de.sum(0)
    rows = []
    for total in count_de.sum(1):
        rows.append(random.multivariate_hypergeometric(left_e, int(total), method="marginals"))
        left_e = left_e - rows[-1]
    return np.array(rows, np.int64).reshape(count_de.shape)


class TokenCounts:
    """How often each expert of each layer took each token, and where it did so last.

    Counted are the most frequent tokens, as many as `MOST_COUNTS` counts hold: rare ones say little
    of an expert.

    Args:
        frequency_v: int [V]; how often each token occurs in the text.
        layers, experts: L and E.
    """

    def __init__(self, frequency_v: np.ndarray, layers: int, experts: int):
        most = max(1, MOST_COUNTS // max(1, layers * experts))
        order_v = np.argsort(-frequency_v, kind="stable")[:most]
        self.id_v = np.sort(order_v[frequency_v[order_v] > 0])
        self._index_v = np.full(len(frequency_v), -1, np.int64)
        self._index_v[self.id_v] = np.arange(len(self.id_v))
        shape = (layers, len(self.id_v), experts)
        self.count_lve = np.zeros(shape, np.int32)
        self.place_lve = np.full(shape, -1, np.int64)

    def add(self, token_n: np.ndarray, place_n: np.ndarray, expert_lns: np.ndarray) -> None:
        """Counts tokens.

        Args:
            token_n: ids.
            place_n: where each stands, to find its context again.
            expert_lns: their experts; E where there is none.
        """
        _, tokens, experts = self.count_lve.shape
        index_n1 = self._index_v[token_n][:, None]
        for count_ve, place_ve, expert_ns in zip(
            self.count_lve, self.place_lve, expert_lns, strict=True
        ):
            real_ns = (expert_ns < experts) & (index_n1 >= 0)
            key_a = (index_n1 * experts + expert_ns)[real_ns]
            count_ve += np.bincount(key_a, minlength=tokens * experts).reshape(tokens, experts)
            place_a = np.broadcast_to(place_n[:, None], real_ns.shape)[real_ns]
            place_ve.reshape(-1)[key_a] = place_a

    def top(self, load_le: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the `TOP` tokens of each expert: ids, lift, count and place, each [L, E, W].

        The order is that of count * log(lift), what a token adds to the divergence of the expert's
        tokens from the layer's: neither the rarest tokens lead, nor the most frequent. Tokens below
        chance are none of an expert's; behind the last the id is -1.

        Args:
            load_le: int [L, E]; all assignments.
        """
        layers, _, experts = self.count_lve.shape
        kept = np.zeros((4, layers, experts, TOP))
        kept[0] = kept[3] = -1
        for layer, (count_ve, place_ve) in enumerate(
            zip(self.count_lve, self.place_lve, strict=True)
        ):
            lift_ve = _lift(count_ve, load_le[layer])
            above_ve = np.where(lift_ve > 1, count_ve * np.log(np.maximum(lift_ve, 1)), 0)
            best_we = np.argsort(-above_ve, axis=0, kind="stable")[:TOP]
            values = np.stack(
                [np.broadcast_to(self.id_v[:, None], count_ve.shape), lift_ve, count_ve, place_ve]
            )
            best = np.take_along_axis(values, best_we[None], axis=1)
            real_we = np.take_along_axis(above_ve, best_we, axis=0) > 0
            empty = np.array([-1.0, 0, 0, -1])[:, None, None]
            kept[:, layer, :, : len(best_we)] = np.where(real_we, best, empty).swapaxes(1, 2)
        ids, lift, count, place = kept
        return (
            ids.astype(np.int32),
            lift.astype(np.float32),
            count.astype(np.int64),
            place.astype(np.int64),
        )


def _lift(count_ve: np.ndarray, load_e: np.ndarray) -> np.ndarray:
    """Returns each token's share of an expert's assignments over its share of the layer's."""
    expected_ve = count_ve.sum(1, keepdims=True) * (load_e / max(load_e.sum(), 1))[None]
    return count_ve / np.where(expected_ve > 0, expected_ve, 1)


def experts_to_remove(
    load_le: np.ndarray, experts_l: np.ndarray, most: int, seed: int = 0
) -> list[tuple[int, int]]:
    """Returns (layer, expert) of at most `most` experts: all, or the most loaded and a sample.

    Half of them carry the most, the others are drawn from the rest.
    """
    pairs = [(layer, e) for layer, count in enumerate(experts_l) for e in range(count)]
    if len(pairs) <= most:
        return pairs
    pairs.sort(key=lambda pair: -load_le[pair])
    first = -(-most // 2)
    rest = np.random.default_rng(seed).permutation(len(pairs) - first)[: most - first]
    return sorted(pairs[:first] + [pairs[first + i] for i in rest])


@dataclasses.dataclass(frozen=True, eq=False)
class Agreement:
    """How alike two models route the same tokens, by MoE layer.

    Attributes:
        same_l: share of the second model's choices that the first made too, by number of expert.
        chance_l: what that would be if both chose independently, each expert as often as it does.
        matched_l: the share when the first model's experts are renamed, one to one, as is best.
        match_le: int [L, E]; the expert of the second model that each of the first is renamed to.
    """

    same_l: np.ndarray
    chance_l: np.ndarray
    matched_l: np.ndarray
    match_le: np.ndarray


def agreement(a_lns: np.ndarray, b_lns: np.ndarray, experts: int) -> Agreement:
    """Compares the choices of two models for the same tokens.

    Args:
        a_lns, b_lns: int [L, N, S]; `experts` or more for none. S may differ.
        experts: E of the larger one.
    """
    from scipy.optimize import linear_sum_assignment

    rows = []
    for a_ns, b_ns in zip(a_lns, b_lns, strict=True):
        a_ne, b_ne = _taken(a_ns, experts), _taken(b_ns, experts)
        both_ee = a_ne.T @ b_ne
        total = max(b_ne.sum(), 1)
        chance = a_ne.sum(0) @ b_ne.sum(0) / max(len(a_ns), 1)
        mine, theirs = linear_sum_assignment(both_ee, maximize=True)
        matched = both_ee[mine, theirs].sum()
        rows.append((np.trace(both_ee) / total, chance / total, matched / total, theirs))
    same_l, chance_l, matched_l, match_le = (np.array(column) for column in zip(*rows, strict=True))
    return Agreement(same_l, chance_l, matched_l, match_le)


def same_choices(a_lns: np.ndarray, b_lns: np.ndarray, experts: int) -> np.ndarray:
    """Returns float [L]: the share of b's choices that a made too; see `agreement`."""
    both = [
        (_taken(a_ns, experts) * _taken(b_ns, experts)).sum() / max(1, (b_ns < experts).sum())
        for a_ns, b_ns in zip(a_lns, b_lns, strict=True)
    ]
    return np.array(both, np.float32)


def _taken(expert_ns: np.ndarray, experts: int) -> np.ndarray:
    """Returns float32 [N, E]: 1 where a token took an expert."""
    taken_ne = np.zeros((len(expert_ns), experts + 1), np.float32)
    np.put_along_axis(taken_ne, np.minimum(expert_ns, experts).astype(np.int64), 1, axis=1)
    return taken_ne[:, :experts]
