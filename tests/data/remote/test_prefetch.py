"""When a shard is needed next; evicting the shard that is needed latest fetches as few shards as possible."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from wasteddp.data.remote.prefetch import NEVER, NextUses

SHARDS = st.sampled_from("abcdefg")


def next_uses_of(needs: Sequence[str], others: Sequence[str] = (), **how: int) -> NextUses[int]:
    """Each step needs the shards named by the letters of its word."""
    return NextUses(((n, frozenset(word)) for n, word in enumerate(needs)), map(frozenset, others), **how)


def test_steps_are_taken_in_their_order_with_what_they_need() -> None:
    uses = next_uses_of(["ab", "", "c"])
    assert uses.distance("c") == 2
    assert [uses.take() for _ in range(4)] == [(0, {"a", "b"}), (1, set()), (2, {"c"}), None]


def test_what_comes_next_is_named_in_its_order_and_only_so_far_ahead() -> None:
    uses = next_uses_of(["ab", "b", "c", "d"], in_flight=2)
    assert uses.upcoming(3) == [(0, "a"), (0, "b"), (2, "c")]
    uses.take()
    uses.take()
    assert uses.upcoming(1) == [(-2, "a"), (-2, "b"), (0, "c")]
    uses.take()
    assert uses.upcoming(9) == [(-2, "b"), (-1, "c"), (0, "d")]


def test_other_ranks_count_for_distance_and_are_not_fetched() -> None:
    uses = next_uses_of(["a", "a", "a"], ["", "b"])
    assert uses.distance("b") == 1
    assert uses.upcoming(3) == [(0, "a")]
    uses.take()
    uses.take()
    assert uses.distance("b") == NEVER


def test_the_lookahead_limits_how_many_steps_are_read() -> None:
    read: list[int] = []

    def steps() -> object:
        for number in range(1000):
            read.append(number)
            yield number, frozenset("a" if number == 500 else "b")

    uses: NextUses[int] = NextUses(steps(), lookahead=100)  # type: ignore[arg-type]
    assert read == []
    assert uses.distance("a") == NEVER
    assert len(read) == 100
    assert uses.distance("b") == 0
    assert len(read) == 100


@given(st.lists(st.sets(SHARDS, max_size=3), max_size=30), st.integers(0, 3), st.integers(0, 40))
def test_distances_are_those_that_counting_gives(needs: list[set[str]], in_flight: int, taken: int) -> None:
    uses = next_uses_of(["".join(step) for step in needs], in_flight=in_flight)
    position = sum(uses.take() is not None for _ in range(taken))
    for shard in "abcdefg":
        at = [n for n, step in enumerate(needs) if shard in step and n >= position - in_flight]
        assert uses.distance(shard) == (at[0] - position if at else NEVER)


def fewest_fetches(needs: Sequence[str], room: int) -> int:
    """Belady's rule on a list: evict the shard that is needed again last, or never. No other rule fetches fewer."""
    there: set[str] = set()
    fetches = 0
    for n, shard in enumerate(needs):
        if shard not in there:
            fetches += 1
            if len(there) == room:
                rest = list(needs[n + 1 :])
                there.remove(max(there, key=lambda s: rest.index(s) if s in rest else len(rest)))
            there.add(shard)
    return fetches


@given(st.lists(SHARDS, max_size=60), st.integers(1, 5))
def test_evicting_the_most_distant_fetches_as_few_as_possible(needs: list[str], room: int) -> None:
    uses = next_uses_of(needs)
    there: set[str] = set()
    fetches = 0
    while taken := uses.take():
        (shard,) = taken[1]
        if shard not in there:
            fetches += 1
            if len(there) == room:
                there.remove(max(sorted(there), key=uses.distance))
            there.add(shard)
    assert fetches == fewest_fetches(needs, room)
