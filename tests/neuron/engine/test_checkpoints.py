"""Where states of recurrent layers are kept, and which of them a prompt finds again."""

from __future__ import annotations

import pytest

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import NOTHING, Block, BlockPool, Match
from cortex.neuron.engine.checkpoints import APART, StateBooks
from cortex.neuron.engine.messages import Generate
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.nn.plan import NO_SLOT, StateCopy

END = 9
SIZE = 4


def scheduler(
    *, kept: int = 8, running: int = 4, chunk: int = 100, caching: bool = True, stride: int | None = None
) -> Scheduler:
    return Scheduler(
        BlockPool(200, SIZE, caching=caching),
        context=400,
        pace=Pace(chunk, 1, 1000),
        vocab=100,
        clock=lambda: 0.0,
        max_running=running,
        states=StateBooks(running, kept, block=SIZE, apart=8, stride=stride),
    )


def ask(made: Scheduler, key: int, ids: list[int], max_tokens: int = 3) -> None:
    settings = Sampling(max_tokens=max_tokens, stop_ids=(END,))
    assert made.add(Generate(key=key, request_id="r", ids=ids, sampling=settings)) is None


def step(made: Scheduler, token: int = 50) -> Scheduled:
    scheduled = made.schedule()
    assert scheduled is not None
    made.complete(scheduled, [(token, None)] * len(scheduled.sampled))
    return scheduled


def run(made: Scheduler, key: int, ids: list[int], max_tokens: int = 3) -> tuple[list[list[int]], int]:
    """One sequence to its end: the lengths of its prefill's pieces, and what was known of it."""
    ask(made, key, ids, max_tokens)
    pieces, known = [], None
    while not made.idle:
        scheduled = step(made)
        (segment,) = scheduled.plan.segments
        known = segment.start if known is None else known
        if segment.end <= len(ids):
            pieces.append([segment.start, segment.end])
    assert known is not None
    return pieces, known


def message(seed: int, length: int) -> list[int]:
    """Tokens that end a message."""
    return [*(10 + (seed + 3 * index) % 80 for index in range(length - 1)), END]


def test_prefill_stops_after_the_first_message_and_the_last_two() -> None:
    ids = [*message(1, 22), *message(2, 17), *message(3, 30), *message(4, 25), 1, 2]
    assert run(scheduler(), 1, ids) == ([[0, 20], [20, 68], [68, 92], [92, 96]], 0)


def test_marks_that_lie_close_together_are_one_and_a_short_prompt_has_its_end() -> None:
    books = StateBooks(1, 1, block=SIZE, apart=8)
    assert books.marks([*message(1, 6), *message(2, 10), *message(3, 6)], [END], 0) == [16]
    assert books.marks(message(1, 6), [END], 0) == [4]
    assert books.marks(message(1, 3), [END], 0) == []
    assert books.marks([*message(1, 40), 1], [END], 36) == []
    assert books.marks([*message(1, 60), 1], [END], 36) == [60]
    assert StateBooks().marks(message(1, 60), [END], 0) == []
    assert APART >= 16, "states are large"


def test_the_next_turn_goes_on_where_the_last_one_ended_and_others_share_the_first_message() -> None:
    made = scheduler()
    system, first = message(1, 40), message(2, 21)
    _, known = run(made, 1, [*system, *first])
    assert known == 0
    turn = [*system, *first, 50, 50]
    assert run(made, 2, [*turn, *message(3, 20)])[1] == 63, "but for the reply's last token, all is known"
    assert run(made, 3, [*system, *message(7, 20)])[1] == 40
    assert run(made, 4, [*system, *first, 51, *message(3, 20)])[1] == 60, "another reply, the same question"
    assert run(made, 5, message(5, 30))[1] == 0


def test_who_begins_with_what_is_being_computed_waits_for_its_state() -> None:
    made = scheduler(chunk=16)
    shared = message(1, 60)
    for key in range(1, 4):
        ask(made, key, [*shared, *message(key + 4, 15)])
    starts = {}
    while not made.idle:
        scheduled = step(made)
        for sequence, segment in zip(scheduled.sequences, scheduled.plan.segments, strict=True):
            starts.setdefault(sequence.key, segment.start)
    assert starts == {1: 0, 2: 60, 3: 60}


def test_a_state_is_copied_before_its_slot_is_anothers() -> None:
    made = scheduler(running=1)
    ids = message(1, 30)
    ask(made, 1, ids, max_tokens=1)
    ask(made, 2, [*ids, 50, *message(2, 20)], max_tokens=1)
    plans = [step(made).plan for _ in range(4)]
    assert [(plan.segments[0].start, plan.segments[0].end) for plan in plans] == [
        (0, 28),
        (28, 30),
        (30, 48),
        (48, 51),
    ]
    assert [plan.states for plan in plans] == [
        [],
        [StateCopy(0, 1, 28)],
        [StateCopy(0, 2, 30)],  # the end of the first one, which the second one goes on from where it is
        [StateCopy(0, 2, 48)],  # there instead, as another block goes on from that end now
    ]
    assert {plan.segments[0].slot for plan in plans} == {0}


def test_the_last_slot_is_taken_over_where_there_is_no_room_for_what_is_in_it() -> None:
    made = scheduler(running=1, kept=0)
    ids = message(1, 30)
    assert run(made, 1, ids, max_tokens=1)[1] == 0
    assert made.states.kept == 1
    ask(made, 2, [*ids, *message(2, 20)], max_tokens=1)
    scheduled = step(made)
    assert scheduled.plan.segments[0].start == 30
    assert scheduled.plan.states == []
    assert made.states.kept == 1, "the state after the second one"


def test_who_runs_gets_the_slot_that_was_unused_for_longest_and_what_was_there_goes_to_the_host() -> None:
    made = scheduler(running=2, kept=8)
    for key in (1, 2):
        run(made, key, message(key, 30), max_tokens=1)
    ask(made, 3, message(3, 30), max_tokens=1)
    scheduled = step(made)
    (move,) = scheduled.plan.states
    assert move == StateCopy(scheduled.plan.segments[0].slot, move.target, 30)
    assert move.target >= 2
    while not made.idle:
        step(made)
    assert run(made, 4, [*message(1, 30), 1])[1] == 30, "there it is found again"


def test_what_a_sequence_goes_on_from_is_not_given_up_for_the_slot_that_it_needs() -> None:
    """All slots are taken, the host is full, and what is sought there was unused for longest."""
    books = StateBooks(2, 1, block=SIZE)
    sought, one, other = (Block(place) for place in range(3))
    slot = books.begin(NOTHING)
    books.keep(slot, sought, 4)
    books.leave(slot, one, 8)
    books.leave(books.begin(NOTHING), other, 8)
    assert (sought.state, {one.state, other.state}) == (2, {0, 1})
    books.take_copies()
    slot = books.begin(Match([sought], None, 0))
    assert books.take_copies() == [StateCopy(2, slot, 4)]
    assert (sought.state, one.state, other.state is None) == (2, None, other.state == slot)
    books.check([slot], [sought, other])


def test_a_copy_that_is_still_to_be_made_is_not_lost_where_there_is_nothing_to_do() -> None:
    made = scheduler(running=1)
    run(made, 1, message(1, 30), max_tokens=1)
    ask(made, 2, message(2, 30), max_tokens=1)
    made._admit()
    made.cancel(2)
    assert made.schedule() is None
    ask(made, 3, message(3, 30))
    assert StateCopy(0, 2, 30) in step(made).plan.states


def test_the_one_unused_for_longest_gives_way() -> None:
    made = scheduler(kept=3, running=1)
    prompts = [message(seed, 30) for seed in (1, 2, 3)]
    for key, ids in enumerate(prompts[:2]):
        run(made, key, ids)  # keeps two each
    assert made.states.kept == 4
    assert run(made, 5, [*prompts[0], 1])[1] == 28
    run(made, 6, prompts[2])
    assert made.states.kept == 4
    assert run(made, 7, [*prompts[1], 1])[1] == 0, "its states have gone, if not its keys and values"
    assert run(made, 8, [*prompts[2], 1])[1] == 28


def test_without_a_cache_nothing_is_kept_and_all_is_computed() -> None:
    made = scheduler(caching=False)
    for key in (1, 2):
        assert run(made, key, message(1, 30)) == ([[0, 30]], 0), "nor is prefill cut"
    assert made.states.kept == 0


def test_without_room_on_the_host_slots_that_nobody_runs_in_are_kept_until_they_are_needed() -> None:
    made = scheduler(kept=0, running=3)
    assert run(made, 1, message(1, 30)) == ([[0, 28], [28, 30]], 0)
    assert made.states.kept == 2, "the end of the prompt and that of the reply"
    assert run(made, 2, message(1, 30))[1] == 28
    run(made, 3, message(2, 30))
    assert made.states.kept == 3
    assert run(made, 4, message(1, 30))[1] == 28, "what was used last is kept"


def test_no_step_computes_tokens_on_both_sides_of_a_stride() -> None:
    made = scheduler(stride=16)
    assert run(made, 1, message(1, 30)) == ([[0, 16], [16, 28], [28, 30]], 0)
    assert run(made, 2, [*message(1, 30), 50, 50, *message(3, 25)])[0] == [[32, 48], [48, 56], [56, 57]]


def test_a_state_goes_with_its_block() -> None:
    made = scheduler()
    run(made, 1, message(1, 30))
    assert made.states.kept == 2
    assert len(made.states._free) < 4
    made.pool.forget_idle()
    assert made.states.kept == 0
    made.states.check([], [])


def test_a_partly_known_block_is_of_use_only_whole() -> None:
    books = StateBooks(1, 2, block=SIZE)
    first, end = Block(0), Block(1)
    end.tokens = (1, 2, 3)
    books.keep(0, first, 4)
    books.keep(0, end, 7)
    assert books.usable(Match([first], end, 3)) == Match([first], end, 3)
    assert books.usable(Match([first], end, 2)) == Match([first], None, 0)
    books.forget(first)
    assert books.usable(Match([first], end, 2)) == Match([], None, 0)
    assert StateBooks().usable(Match([first], end, 2)) == Match([first], end, 2)
    assert StateBooks().begin(Match([first], None, 0)) == NO_SLOT


def test_the_check_finds_books_that_do_not_agree() -> None:
    books = StateBooks(2, 2, block=SIZE)
    block = Block(0)
    books.keep(0, block, 4)
    books.check([], [block])
    with pytest.raises(AssertionError, match="a state is lost"):
        books.check([], [])
    with pytest.raises(AssertionError, match="two owners"):
        books.check([0], [block])
    slot = books.begin(NOTHING)
    books.check([slot], [block])
    with pytest.raises(AssertionError, match="a slot is lost"):
        books.check([], [block])


@pytest.mark.parametrize("forgets", [False, True])
def test_agents_that_send_their_conversations_again_pay_for_what_is_new(forgets: bool) -> None:
    """Six agents over one system prompt, eight turns each, in turns; where a template forgets what a model
    has thought, the next turn lacks half of the reply.
    """
    made = Scheduler(
        BlockPool(4000, 16),
        context=6000,
        pace=Pace(512, 1, 1000),
        vocab=100,
        clock=lambda: 0.0,
        max_running=8,
        states=StateBooks(8, 40, block=16),
    )
    system = message(3, 1500)
    histories = {agent: list(system) for agent in range(6)}
    new, computed = len(system), 0
    for turn in range(8):
        for agent, history in histories.items():
            question = message(7 * agent + turn, 90 + agent)
            history += question
            ask(made, 100 * turn + agent, history, max_tokens=60)
            while not made.idle:
                scheduled = step(made, token=20 + agent)
                computed += scheduled.prefill
            new += len(question)
            history += [20 + agent] * (30 if forgets else 60)
            new += 30 if forgets else 0
    assert computed <= 1.05 * new
