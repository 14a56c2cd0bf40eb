"""When a shard is needed next; evicting the shard that is needed latest fetches as few shards as possible."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from wasteddp.order.demand import NEVER, Demand

SHARDS = st.sampled_from("abcdefg")


def demand_of(needs: Sequence[str], others: Sequence[str] = (), **how: int) -> Demand[int]:
    """Each step needs the shards named by the letters of its word."""
    return Demand(((n, frozenset(word)) for n, word in enumerate(needs)), map(frozenset, others), **how)


def test_steps_are_taken_in_their_order_with_what_they_need() -> None:
    demand = demand_of(["ab", "", "c"])
    assert demand.distance("c") == 2
    assert [demand.take() for _ in range(4)] == [(0, {"a", "b"}), (1, set()), (2, {"c"}), None]


def test_what_comes_next_is_named_in_its_order_and_only_so_far_ahead() -> None:
    demand = demand_of(["ab", "b", "c", "d"], in_flight=2)
    assert demand.upcoming(3) == [(0, "a"), (0, "b"), (2, "c")]
    demand.take()
    demand.take()
    assert demand.upcoming(1) == [(-2, "a"), (-2, "b"), (0, "c")]
    demand.take()
    assert demand.upcoming(9) == [(-2, "b"), (-1, "c"), (0, "d")]


def test_other_ranks_count_for_distance_and_are_not_fetched() -> None:
    demand = demand_of(["a", "a", "a"], ["", "b"])
    assert demand.distance("b") == 1
    assert demand.upcoming(3) == [(0, "a")]
    demand.take()
    demand.take()
    assert demand.distance("b") == NEVER


def test_the_lookahead_limits_how_many_steps_are_read() -> None:
    read: list[int] = []

    def steps() -> object:
        for number in range(1000):
            read.append(number)
            yield number, frozenset("a" if number == 500 else "b")

    demand: Demand[int] = Demand(steps(), lookahead=100)  # type: ignore[arg-type]
    assert read == []
    assert demand.distance("a") == NEVER
    assert len(read) == 100
    assert demand.distance("b") == 0
    assert len(read) == 100


@given(st.lists(st.sets(SHARDS, max_size=3), max_size=30), st.integers(0, 3), st.integers(0, 40))
def test_distances_are_those_that_counting_gives(needs: list[set[str]], in_flight: int, taken: int) -> None:
    demand = demand_of(["".join(step) for step in needs], in_flight=in_flight)
    position = sum(demand.take() is not None for _ in range(taken))
    for shard in "abcdefg":
        at = [n for n, step in enumerate(needs) if shard in step and n >= position - in_flight]
        assert demand.distance(shard) == (at[0] - position if at else NEVER)


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
    demand = demand_of(needs)
    there: set[str] = set()
    fetches = 0
    while taken := demand.take():
        (shard,) = taken[1]
        if shard not in there:
            fetches += 1
            if len(there) == room:
                there.remove(max(sorted(there), key=demand.distance))
            there.add(shard)
    assert fetches == fewest_fetches(needs, room)
