"""Batches that are passed over: the list as text, and which batch a step then sees."""

import pytest

from moejax.errors import ConfigError
from moejax.skip_list import SkipList, resumed_list


def test_which_batch_a_step_sees():
    """Of batches 0 1 [2 3 4] 5 [6] 7 8: the list takes none twice and leaves the order."""
    skip = SkipList.parse("2-4,6")
    assert [skip.batch(finished) for finished in range(-1, 5)] == [-1, 0, 1, 5, 7, 8]
    assert [SkipList().batch(finished) for finished in range(3)] == [0, 1, 2]
    assert SkipList.parse("0-1").batch(0) == 2


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_nth_of_the_rest(seed):
    import random

    drawn = random.Random(seed).sample(range(60), 25)
    skip = SkipList.parse(",".join(map(str, drawn)))
    rest = [index for index in range(60) if index not in drawn]
    assert [skip.batch(finished) for finished in range(len(rest))] == rest
    assert SkipList.parse(str(skip)) == skip


def test_ranges_that_touch_or_overlap_are_one():
    skip = SkipList.parse("10-12, 3 ,13-15,11-20,40")
    assert skip.ranges == ((3, 4), (10, 21), (40, 41))
    assert str(skip) == "3,10-20,40"
    assert str(SkipList()) == ""
    assert SkipList.parse("").ranges == SkipList.parse(None).ranges == ()
    assert skip.before(15) == SkipList.parse("3,10-14")
    assert skip.before(3) == SkipList()
    assert skip.union(SkipList.parse("2,21")) == SkipList.parse("2-3,10-21,40")


@pytest.mark.parametrize("text", ["5-3", "a", "1-", "-4", "1;2", "1-2-3", "12345678901", ","])
def test_what_is_no_list(text):
    with pytest.raises(ConfigError, match=r"is not a range of batches; .* for example 120-180,512"):
        SkipList.parse(text)


def test_a_range_that_comes_later_leaves_the_past_as_it_was():
    """So a list that grows at a resume is a function of the step: those before see the same."""
    before = SkipList.parse("2-4")
    after = resumed_list(before, SkipList.parse("2-4,9-11"), 6)
    assert after == SkipList.parse("2-4,9-11")
    assert [before.batch(n) for n in range(6)] == [after.batch(n) for n in range(6)]
    assert after.batch(6) == 12
    assert resumed_list(before, SkipList(), 6) == before  # what was taken stays


def test_a_batch_that_was_seen_cannot_be_left_out():
    with pytest.raises(
        ConfigError,
        match=r"skip_batches=2-4,8 has batches that the first 6 steps .*from 9 on can still",
    ):
        resumed_list(SkipList.parse("2-4"), SkipList.parse("2-4,8"), 6)


def test_a_list_as_long_as_a_command_line_takes_a_moment():
    text = ",".join(str(2 * i) for i in range(100_000))
    assert len(SkipList.parse(text).ranges) == 100_000
    assert SkipList.parse("7,5-6,1,3-8").ranges == ((1, 2), (3, 9))
