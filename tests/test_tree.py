"""Layout of conversations with common beginnings: laws of the prefix tree, and of packing it into rows."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unstilted.lm.score import packs
from unstilted.lm.tree import MIN_SHARED, Request, Tree, first_difference

few_tokens = st.lists(st.integers(3, 5), min_size=1, max_size=7)  # three tokens only: common beginnings of every kind
some_requests = st.lists(st.builds(Request, few_tokens, st.lists(few_tokens, min_size=1, max_size=6)), min_size=1, max_size=4)


def sequences_of(requests: list[Request]) -> list[list[int]]:
    """What each conversation has to be fed: its last token predicts nothing."""
    return [[*prompt, *answer[:-1]] for prompt, answers in requests for answer in answers]


def ways_down(tree: Tree) -> set[tuple[int, ...]]:
    """The tokens from the root to the end of each block."""
    spans = [[*block.ancestors, block.span] for block in tree.blocks]
    return {tuple(token for span in way for token in tree.tokens[slice(*span)]) for way in spans}


@given(some_requests)
def test_every_conversation_is_one_way_down_the_tree(requests: list[Request]) -> None:
    tree = Tree(tuple(requests))
    assert {tuple(sequence) for sequence in sequences_of(requests)} <= ways_down(tree)


@given(some_requests)
def test_each_block_starts_where_its_last_ancestor_ends(requests: list[Request]) -> None:
    tree = Tree(tuple(requests))
    places = [place for block in tree.blocks for place in range(*block.span)]
    assert places == list(range(len(tree.tokens)))
    for block in tree.blocks:
        depth = 0
        for span in (*block.ancestors, block.span):
            assert tree.positions[slice(*span)] == list(range(depth, depth + span.size))
            depth += span.size
        assert all(ancestor.end <= block.span.start for ancestor in block.ancestors)


@given(some_requests)
def test_each_token_is_predicted_from_the_place_before_it(requests: list[Request]) -> None:
    tree = Tree(tuple(requests))
    answers = [(prompt, answer) for prompt, answers in requests for answer in answers]
    assert tree.targets == [token for _, answer in answers for token in answer]
    seen = tree.visible()
    places = iter(tree.predicting)
    for prompt, answer in answers:
        for n in range(len(answer)):
            place = next(places)
            visible = seen[place].nonzero()[:, 0].tolist()
            assert [tree.tokens[other] for other in sorted(visible, key=tree.positions.__getitem__)] == [*prompt, *answer[:n]]
            assert visible[-1] == place


@given(some_requests)
def test_two_conversations_share_all_of_a_common_beginning_but_a_rest_shorter_than_the_smallest_block(requests: list[Request]) -> None:
    tree = Tree(tuple(requests))
    sequences = sequences_of(requests)
    chains = {tuple(tree.tokens[p] for span in way for p in range(*span)): way for way in ([*b.ancestors, b.span] for b in tree.blocks)}
    for one in sequences:
        for other in sequences:
            if one == other:
                continue
            common = first_difference([one, other], 0)
            places = [{p for span in chains[tuple(sequence)] for p in range(*span)} for sequence in (one, other)]
            assert common - MIN_SHARED < len(places[0] & places[1]) <= common


@given(some_requests)
def test_a_place_sees_itself_and_the_ancestors_of_its_block_and_nothing_else(requests: list[Request]) -> None:
    tree = Tree(tuple(requests))
    seen = tree.visible()
    for block in tree.blocks:
        for place in range(*block.span):
            expected = {p for span in block.ancestors for p in range(*span)} | set(range(block.span.start, place + 1))
            assert set(seen[place].nonzero()[:, 0].tolist()) == expected


def test_a_pair_that_shares_its_prompt_and_its_first_words_is_three_blocks() -> None:
    tree = Tree((Request([5, 6], [[7, 8, 9, 2], [7, 8, 10, 11, 2]]),))
    assert tree.tokens == [5, 6, 7, 8, 9, 10, 11]
    assert tree.positions == [0, 1, 2, 3, 4, 4, 5]
    assert [tuple(block.span) for block in tree.blocks] == [(0, 4), (4, 5), (5, 7)]
    assert tree.predicting == [1, 2, 3, 4, 1, 2, 3, 5, 6]


@given(some_requests, st.integers(1, 60))
@settings(deadline=None)
def test_packs_take_each_request_once_in_order_and_keep_to_the_budget(requests: list[Request], budget: int) -> None:
    found = list(packs(requests, budget))
    assert [index for pack in found for index in pack] == list(range(len(requests)))
    for pack in found:
        assert len(pack) == 1 or len(Tree(tuple(requests[index] for index in pack)).tokens) <= budget
    for pack, following in pairwise(found):  # none is closed before it is full
        assert len(Tree(tuple(requests[index] for index in (*pack, following[0]))).tokens) > budget


def test_no_requests_are_no_packs() -> None:
    assert list(packs([], 10)) == []


@given(few_tokens)
def test_requests_with_an_empty_prompt_are_packed_with_the_one_token_that_will_stand_for_it(answer: list[int]) -> None:
    assume(len(answer) > 1)
    request = Request([], [answer])
    assert list(packs([request, request], len(answer))) == [[0, 1]]
    assert list(packs([request, Request([], [[9, *answer]])], len(answer))) == [[0], [1]]


@pytest.mark.parametrize("request_", [Request([1], []), Request([1], [[2], []]), Request([], [[2]])])
def test_a_tree_of_nothing_is_refused(request_: Request) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Tree((request_,))
