"""The books of the cache: which block is whose, what idle ones still know, in which order they go."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.engine.blocks import NOTHING, Block, BlockPool, Match, common

SIZE = 4


def spell(*words: str) -> list[int]:
    """A token for each letter."""
    return [ord(letter) for letter in "".join(words)]


def store(pool: BlockPool, text: str, *held: list[Block]) -> list[Block]:
    """What a sequence with this prompt leaves behind: its blocks are known, and nobody holds them.

    `held` are the blocks of others meanwhile.
    """
    tokens = spell(text)
    blocks = pool.take(pool.count_for(len(tokens)))
    for index, block in enumerate(blocks):
        part = tuple(tokens[index * SIZE : (index + 1) * SIZE])
        blocks[index] = pool.learn(block, blocks[index - 1] if index else None, part)
    pool.check([blocks, *held])
    pool.release(blocks)
    pool.check(held)
    return blocks


def found(pool: BlockPool, text: str) -> tuple[int, int]:
    """Tokens that are known of a prompt: in whole blocks, and of one more block."""
    match = pool.match(spell(text))
    return len(match.chain) * SIZE, match.shared


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8, SIZE)


# --- taking and giving back ---


def test_tokens_take_whole_blocks(pool: BlockPool) -> None:
    assert [pool.count_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_blocks_that_are_taken_lie_in_a_row(pool: BlockPool) -> None:
    assert [block.place for block in pool.take(3)] == [0, 1, 2]
    assert (pool.available, pool.held, pool.idle) == (5, 3, 0)


def test_a_hole_that_is_large_enough_is_preferred_to_pieces(pool: BlockPool) -> None:
    first, kept, _ = pool.take(1), pool.take(1), pool.take(2)
    pool.release(first)
    assert [block.place for block in pool.take(3)] == [4, 5, 6]
    assert [block.place for block in pool.take(2)] == [0, 7], "no two lie together any more"
    assert kept[0].place == 1


def test_blocks_go_on_right_after_another_one_as_far_as_there_is_room(pool: BlockPool) -> None:
    mine, others = pool.take(2), pool.take(2)
    pool.release(others)
    assert [block.place for block in pool.take(1, after=mine[-1])] == [2]
    pool.take(1)  # place 3
    assert [block.place for block in pool.take(2, after=mine[0])] == [4, 5], "1 to 3 are taken"


def test_more_than_there_is_cannot_be_taken(pool: BlockPool) -> None:
    pool.take(6)
    with pytest.raises(ValueError, match="3 blocks were asked for and 2 are available"):
        pool.take(3)
    assert pool.available == 2


def test_what_is_released_unknown_is_free_at_once(pool: BlockPool) -> None:
    blocks = pool.take(8)
    pool.release(blocks)
    assert (pool.available, pool.idle, pool.held) == (8, 0, 0)


def test_releasing_twice_is_an_error(pool: BlockPool) -> None:
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="block 0 is released and nobody holds it"):
        pool.release(blocks)


def test_a_block_that_two_hold_is_free_when_both_have_left(pool: BlockPool) -> None:
    chain = store(pool, "abcd")
    pool.hold(chain)
    pool.hold(chain)
    pool.check([chain, chain])
    pool.release(chain)
    assert pool.held == 1
    pool.release(chain)
    assert (pool.held, pool.idle) == (0, 1)


def test_idle_blocks_of_a_chain_are_those_that_nobody_holds(pool: BlockPool) -> None:
    chain = store(pool, "abcdefgh")
    assert pool.idle_in(chain) == 2
    pool.hold(chain[:1])
    assert pool.idle_in(chain) == 1


# --- what is known ---


def test_the_longest_known_beginning_is_found(pool: BlockPool) -> None:
    store(pool, "abcdefghij")
    assert found(pool, "abcdefghijkl") == (8, 2)
    assert found(pool, "abcdefgX") == (4, 3)
    assert found(pool, "abXX") == (0, 2)
    assert found(pool, "X") == (0, 0)


def test_the_last_token_is_always_left_to_compute(pool: BlockPool) -> None:
    store(pool, "abcdefgh")
    assert found(pool, "abcdefgh") == (4, 3)
    assert found(pool, "abcdefghi") == (8, 0)
    assert found(pool, "a") == found(pool, "") == (0, 0)


def test_of_many_continuations_the_one_that_shares_most_is_found(pool: BlockPool) -> None:
    for text in ("abcdeX", "abcdefg", "abcdefX"):
        store(pool, text)
    match = pool.match(spell("abcdefgh"))
    assert match.partial is not None
    assert match.partial.tokens == tuple(spell("efg"))
    assert match.tokens(SIZE) == 7


def test_contents_that_are_known_already_are_shared_and_the_copy_is_given_back(pool: BlockPool) -> None:
    known = store(pool, "abcd")
    (copy,) = pool.take(1)
    assert pool.learn(copy, None, tuple(spell("abcd"))) is known[0]
    pool.check([known])
    assert pool.held == 1


def test_the_same_tokens_after_others_are_other_contents(pool: BlockPool) -> None:
    store(pool, "aaaabbbb")
    store(pool, "ccccbbbb")
    assert (found(pool, "aaaabbbbX"), found(pool, "ccccbbbbX"), found(pool, "bbbbX")) == (
        (8, 0),
        (8, 0),
        (0, 0),
    )


def test_an_end_gives_way_to_the_block_that_goes_on_from_it(pool: BlockPool) -> None:
    store(pool, "abcdef")
    assert pool.idle == 2
    store(pool, "abcdefgh")
    assert pool.idle == 2, "the end `ef` says nothing that `efgh` does not"


def test_an_end_that_somebody_holds_stays(pool: BlockPool) -> None:
    chain = store(pool, "ab")
    pool.hold(chain)
    store(pool, "abcd", chain)
    assert pool.idle == 1
    pool.release(chain)
    assert pool.idle == 2


def test_without_caching_nothing_is_found_or_kept() -> None:
    pool = BlockPool(4, SIZE, caching=False)
    blocks = pool.take(2)
    assert pool.match(spell("abcdefgh")) is NOTHING
    pool.release(blocks)
    assert (pool.idle, pool.available) == (0, 4)


# --- forgetting ---


def test_the_longest_unused_is_forgotten_first_and_ends_before_beginnings(pool: BlockPool) -> None:
    store(pool, "abcdefgh")
    store(pool, "ABCDEFGH")
    pool.hold(pool.match(spell("abcdX")).chain)
    pool.release(pool.match(spell("abcdX")).chain)  # `abcd` was used last
    pool.take(5)  # four places are free, so one must go
    assert (found(pool, "abcdefghX"), found(pool, "ABCDEFGHX")) == ((4, 0), (8, 0))
    pool.take(1)
    assert (found(pool, "abcdefghX"), found(pool, "ABCDEFGHX")) == ((4, 0), (4, 0))
    pool.take(1)
    assert (found(pool, "abcdX"), found(pool, "ABCDX")) == ((4, 0), (0, 0))


def test_what_is_held_is_never_forgotten(pool: BlockPool) -> None:
    chain = store(pool, "abcdefgh")
    pool.hold(chain)
    pool.take(6)
    with pytest.raises(ValueError, match="are available"):
        pool.take(1)
    assert found(pool, "abcdefghX") == (8, 0)


def test_forgetting_spares_what_is_held(pool: BlockPool) -> None:
    chain = store(pool, "abcdefgh")
    store(pool, "xxxx")
    pool.hold(chain[:1])
    pool.forget_idle()
    pool.check([chain[:1]])
    assert (found(pool, "abcdefghX"), found(pool, "xxxxX")) == ((4, 0), (0, 0))


def test_who_keeps_something_for_a_block_hears_that_it_is_forgotten(pool: BlockPool) -> None:
    told: list[Block] = []
    pool.on_forget = told.append
    (block,) = store(pool, "abcd")
    assert not told
    pool.forget_idle()
    assert told == [block]


# --- the check itself ---


def test_the_check_finds_books_that_do_not_agree(pool: BlockPool) -> None:
    one, other = pool.take(2)
    with pytest.raises(AssertionError, match="places are lost"):
        pool.check([[one]])
    with pytest.raises(AssertionError, match="miscounted"):
        pool.check([[one, other], [one]])
    other.place = one.place
    with pytest.raises(AssertionError, match="one place"):
        pool.check([[one, other]])


# --- properties ---


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_what_is_common_is_counted_to_the_first_difference(one: list[int], other: list[int]) -> None:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert common(one, other) == count


@given(st.lists(st.text("ab", min_size=1, max_size=14), max_size=6), st.text("ab", max_size=14))
def test_a_match_is_the_longest_beginning_of_anything_stored(texts: list[str], asked: str) -> None:
    """Room enough for all, so nothing is forgotten but ends that others go on from."""
    pool = BlockPool(64, SIZE)
    for text in texts:
        store(pool, text)
    match = pool.match(spell(asked))
    longest = max((common(text, asked[:-1]) for text in texts), default=0)
    assert match.tokens(SIZE) == longest
    spelt = [token for block in match.chain for token in block.tokens or ()]
    assert spelt == spell(asked)[: len(spelt)]
    assert all(below.parent is above for above, below in pairwise(match.chain))


@given(st.data())
def test_taking_always_gives_as_many_distinct_places_as_were_asked_for(data: st.DataObject) -> None:
    pool = BlockPool(12, SIZE)
    held: list[list[Block]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            count = data.draw(st.integers(0, pool.available))
            after = held[-1][-1] if held and held[-1] else None
            held.append(pool.take(count, after))
            assert len(held[-1]) == count
        pool.check(held)


def test_a_match_counts_its_tokens() -> None:
    assert Match([Block(0), Block(1)], None, 0).tokens(SIZE) == 8
    assert NOTHING.tokens(SIZE) == 0
