"""A unit pays once, only if linked and receipted; silence takes nobody else's pay; collusion gains nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from subnet.trust.ledger import NO_RECEIPT, Direction, Leaf
from subnet.trust.settlement import OFF_PLAN_SHARE, Settlement, Unpaid
from tests.subnet.trust.books import Book, tag, units

BACKWARD, FORWARD = Direction.BACKWARD, Direction.FORWARD


def test_honest_work_is_paid_whole() -> None:
    book = Book()
    settlement = book.settle()
    for hotkey in book.hotkeys:
        paid = settlement.paid[hotkey]
        assert paid.units == paid.claimed > 0
        assert paid.unpaid == {}
    assert len(settlement.pathways) == len(book.samples)
    assert all(path.loss == 1.5 for path in settlement.pathways)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_pipelines_of_any_length_are_paid_whole(stages: int) -> None:
    book = Book(stages=stages, replicas=3, samples=6)
    settlement = book.settle()
    assert len(settlement.pathways) == 6
    for hotkey in book.hotkeys:
        assert units(settlement, hotkey) == len(book.leaves[hotkey])


def test_forged_receipts_pay_nothing() -> None:
    book = Book()
    cheat, honest = book.roster.stages[1]
    book.change(cheat, lambda leaf: replace(leaf, receipt=book.keys[cheat].sign(b"trust me")))
    settlement = book.settle()
    assert settlement.paid[cheat].unpaid == {Unpaid.NO_RECEIPT: len(book.leaves[cheat])}
    for hotkey in (honest, *book.roster.stages[0], *book.roster.stages[2]):
        assert units(settlement, hotkey) == len(book.leaves[hotkey])


def test_invented_input_pays_nothing() -> None:
    book = Book()
    cheat = book.roster.stages[1][0]
    book.change(
        cheat, lambda leaf: replace(leaf, input=tag("dream", leaf.sample)) if leaf.direction is FORWARD else leaf
    )
    settlement = book.settle()
    assert settlement.paid[cheat].forward == 0
    assert settlement.paid[cheat].backward > 0
    assert set(settlement.paid[cheat].unpaid) == {Unpaid.UNLINKED}


def test_a_backward_on_an_invented_input_pays_nothing() -> None:
    book = Book()
    cheat = book.roster.stages[1][0]
    book.change(
        cheat, lambda leaf: replace(leaf, input=tag("dream", leaf.sample)) if leaf.direction is BACKWARD else leaf
    )
    settlement = book.settle()
    assert settlement.paid[cheat].backward == 0
    assert settlement.paid[cheat].forward > 0


def test_a_head_is_paid_for_its_own_samples_only() -> None:
    book = Book()
    one, two = book.roster.stages[0]
    book.leaves[one], book.leaves[two] = book.leaves[two], []
    settlement = book.settle()
    assert settlement.paid[one].unpaid == {Unpaid.NOT_ASSIGNED: len(book.leaves[one])}


def test_work_that_never_came_back_pays_nothing() -> None:
    book = Book()
    head = book.roster.stages[0][0]
    book.change(head, lambda leaf: leaf if leaf.direction is FORWARD else None)
    settlement = book.settle()
    assert settlement.paid[head].unpaid == {Unpaid.NOT_COMPLETED: len(book.leaves[head])}
    assert sum(units(settlement, hotkey) for hotkey in book.roster.stages[2]) == len(book.samples) // 2


def test_a_window_that_was_not_acknowledged_pays_nothing_and_takes_nothing_from_others() -> None:
    book = Book()
    late = book.roster.stages[1][0]
    book.change(late, lambda leaf: replace(leaf, version=int(leaf.sample >= 4)))
    before = book.settle()
    in_time = {hotkey: {0} for hotkey in book.hotkeys}
    settlement = book.settle(windows=in_time)
    missing = sum(leaf.version == 1 for leaf in book.leaves[late])
    assert settlement.paid[late].unpaid == {Unpaid.NOT_ACKNOWLEDGED: missing}
    for hotkey in book.hotkeys:
        assert units(settlement, hotkey) == units(before, hotkey) - missing * (hotkey == late)
    assert units(book.settle(windows={}), late) == 0


def test_a_copied_unit_pays_only_who_did_it() -> None:
    book = Book()
    real, copy = book.roster.stages[1]
    own = len(book.leaves[copy])
    book.leaves[copy] = [*book.leaves[copy], *book.leaves[real]]
    settlement = book.settle()
    assert units(settlement, real) == len(book.leaves[real])
    assert units(settlement, copy) == own
    assert settlement.paid[copy].unpaid == {Unpaid.CONTRADICTED: len(book.leaves[real])}


def test_a_unit_taken_over_from_a_silent_head_pays_the_one_that_was_sent_the_gradient() -> None:
    book = Book()
    dead, heir = book.roster.stages[0]
    mine = [leaf for leaf in book.leaves[dead] if leaf.direction is BACKWARD][:2]
    taken = {leaf.sample for leaf in mine}
    own = units(book.settle(), heir)
    for hotkey in book.roster.stages[1]:
        book.change(
            hotkey,
            lambda leaf, hotkey=hotkey: (
                book.receipted(replace(leaf, sink=1), hotkey, heir)
                if leaf.direction is BACKWARD and leaf.sample in taken
                else leaf
            ),
        )
    book.leaves[heir] += mine
    assert units(book.settle(without=(dead,)), heir) == own + len(mine)
    assert units(book.settle(), heir) == own


def test_a_microbatch_started_for_a_silent_head_pays_its_heir_as_if_it_were_its_own() -> None:
    """Taken over whole: forward and backward leaf, both receipted; with the owner's evidence there it pays nothing."""
    book = Book()
    dead, heir = book.roster.stages[0]
    mine = [leaf for leaf in book.leaves[dead] if leaf.sample < 2]
    assert len(mine) == 2
    body = book.roster.stages[1][mine[0].sink]
    taken = [book.receipted(leaf, heir, body) if leaf.direction is FORWARD else leaf for leaf in mine]
    without = {names: units(book.settle(without=names), heir) for names in ((dead,), (dead, body))}

    def by_heir(leaf: Leaf) -> Leaf:
        if leaf.sample >= 2 or leaf.sample % 2:
            return leaf
        if leaf.direction is FORWARD:
            return replace(leaf, source=1)
        return book.receipted(replace(leaf, sink=1), body, heir)

    book.change(body, by_heir)
    before = units(book.settle(), heir)
    book.leaves[heir] += taken
    settlement = book.settle(without=(dead,))
    assert units(settlement, heir) == without[dead,] + 2 == settlement.paid[heir].claimed
    assert units(settlement, body) == len(book.leaves[body])
    assert units(book.settle(), heir) == before, "the owner is there"
    assert units(book.settle(without=(dead, body)), heir) == without[dead, body]
    book.change(heir, lambda leaf: replace(leaf, receipt=b"x" * 64) if leaf in taken[:1] else leaf)
    assert book.settle(without=(dead,)).paid[heir].unpaid == {Unpaid.NO_RECEIPT: 1}


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_silent_neighbour_takes_nobody_s_pay(stages: int) -> None:
    book = Book(stages=stages)
    for silent in book.hotkeys:
        settlement = book.settle(without=(silent,))
        assert silent not in settlement.paid
        for hotkey in settlement.paid:
            assert units(settlement, hotkey) == settlement.paid[hotkey].claimed, (silent, hotkey)


def test_two_silent_neighbours_take_nobody_s_pay_unless_they_are_head_and_next() -> None:
    book = Book(stages=4)
    for silent in combinations(book.hotkeys, 2):
        stages = {book.roster.stage_of(hotkey) for hotkey in silent}
        settlement = book.settle(without=silent)
        lost = stages == {0, 1}  # nobody with evidence says that what went through both of them came back
        for hotkey in settlement.paid:
            whole = units(settlement, hotkey) == settlement.paid[hotkey].claimed
            assert whole or lost, (silent, hotkey, settlement.paid[hotkey])


def test_one_that_leaves_units_out_takes_only_its_own_pay() -> None:
    book = Book(stages=4)
    for rogue in book.hotkeys:
        stage = book.roster.stage_of(rogue)
        bent = Book(stages=4)
        bent.leaves[rogue] = []
        settlement = bent.settle()
        for hotkey in book.hotkeys:
            if hotkey != rogue and stage != 0:
                assert units(settlement, hotkey) == settlement.paid[hotkey].claimed, (rogue, hotkey)


def test_one_that_says_it_took_something_else_than_it_signed_for_takes_only_its_own_pay() -> None:
    """The consumer's signature is worth more than its leaf."""
    whole = Book(stages=4)
    for rogue in whole.hotkeys:
        book = Book(stages=4)
        book.change(
            rogue,
            lambda leaf: replace(leaf, gradient=tag("lie", leaf.sample)) if leaf.direction is BACKWARD else leaf,
        )
        settlement = book.settle()
        for hotkey in book.hotkeys:
            if hotkey != rogue:
                assert units(settlement, hotkey) == settlement.paid[hotkey].claimed, (rogue, hotkey)


def test_leaves_for_stages_one_does_not_hold_change_nobody_s_pay() -> None:
    book = Book()
    before = book.settle()
    cheat = book.roster.stages[1][0]
    everything = [leaf for leaves in book.leaves.values() for leaf in leaves]
    book.leaves[cheat] = [*everything, *book.leaves[cheat]]
    after = book.settle()
    for hotkey in book.hotkeys:
        assert units(after, hotkey) == units(before, hotkey), hotkey


def test_only_a_head_can_say_that_a_microbatch_came_back() -> None:
    book = Book()
    for head in book.roster.stages[0]:
        book.change(head, lambda leaf: leaf if leaf.direction is FORWARD else None)
    fake = [Leaf(direction=BACKWARD, stage=0, sample=sample, version=0, source=0, loss=0.1) for sample in book.samples]
    book.leaves[book.roster.stages[1][0]] += fake
    settlement = book.settle()
    assert not settlement.pathways
    assert all(units(settlement, hotkey) == 0 for hotkey in book.hotkeys)


def test_the_attempt_that_came_back_is_the_one_that_pays() -> None:
    """Chased: two replicas did the same microbatch, each with receipts; the head took the gradient of one."""
    book = Book(stages=3)
    sample, path = 0, [0, book.planned(0, 1), book.planned(0, 2)]
    before = book.settle()
    again = [book.roster.stages[stage][1 - path[stage]] for stage in (1, 2)]
    book.enter(sample, [path[0], 1 - path[1], 1 - path[2]], only=(1, 2), signers=again, lie="again")
    book.change(
        book.roster.stages[1][1 - path[1]],
        lambda leaf: replace(leaf, input=tag("y", 0, sample)) if leaf.sample == sample else leaf,
    )
    settlement = book.settle()
    assert all(units(settlement, hotkey) == units(before, hotkey) for hotkey in book.hotkeys)
    second = settlement.paid[book.roster.stages[1][1 - path[1]]]
    assert second.unpaid == {Unpaid.CONTRADICTED: 2}


# -- collusion ----------------------------------------------------------------------------------------------------

COALITIONS = [*combinations(range(5), 2), *combinations(range(5), 3), *combinations(range(5), 4)]
"""Stages at each of which one replica takes part."""


def gain(before: Settlement, after: Settlement, coalition: Sequence[str]) -> int:
    return sum(units(after, hotkey) - units(before, hotkey) for hotkey in coalition)


def first_of(book: Book, at: Sequence[int]) -> list[str]:
    return [book.roster.stages[stage][0] for stage in at]


@pytest.mark.parametrize("at", COALITIONS)
def test_inventing_microbatches_gains_nothing_while_one_stage_is_honest(at: tuple[int, ...]) -> None:
    """They sign for each other what was never computed, and sign themselves for everybody else, who knows of nothing.
    No honest replica's death helps them."""
    for silent in ((), *((book_hotkey,) for book_hotkey in Book(stages=5, samples=0).hotkeys)):
        book = Book(stages=5, samples=4)
        coalition = first_of(book, at)
        if set(silent) & set(coalition):
            continue
        before = book.settle(without=silent)
        for sample in range(4, 16, 2):  # of the first head, who is one of them or not
            book.enter(sample, [0] * 5, only=at, signers=coalition, lie="dream")
        after = book.settle(without=silent)
        assert all(units(after, hotkey) == units(before, hotkey) for hotkey in book.hotkeys), silent


@pytest.mark.parametrize("at", COALITIONS)
def test_claiming_what_others_did_gains_nothing(at: tuple[int, ...]) -> None:
    """They know every digest, and sign each other's claims to the microbatches that their siblings did."""
    book = Book(stages=5, samples=8)
    coalition = first_of(book, at)
    before = book.settle()
    for sample in book.samples:
        path = [book.planned(sample, stage) for stage in range(5)]
        others = [stage for stage in at if path[stage] != 0]
        book.enter(sample, [0 if stage in at else path[stage] for stage in range(5)], only=others, signers=coalition)
    after = book.settle()
    assert all(units(after, hotkey) == units(before, hotkey) for hotkey in book.hotkeys)


@pytest.mark.parametrize("at", COALITIONS)
def test_naming_a_friend_instead_of_who_did_it_convicts(at: tuple[int, ...]) -> None:
    """Those of them that were on a microbatch say it came from and went to each other. It may bring their friends
    something, but they have signed twice for it."""
    book = Book(stages=5, samples=8)
    coalition = first_of(book, at)
    before = book.settle()

    def renamed(leaf: Leaf, hotkey: str) -> Leaf:
        up, down = leaf.stage - 1 in at, leaf.stage + 1 in at
        source = up if leaf.direction is FORWARD or leaf.stage == 4 else down
        sink = down if leaf.direction is FORWARD else up
        bent = replace(leaf, source=0 if source else leaf.source, sink=0 if sink else leaf.sink)
        consumer = book.roster.stages[leaf.stage + (1 if leaf.direction is FORWARD else -1)][0] if sink else None
        return bent if consumer is None else book.receipted(bent, hotkey, consumer)

    for hotkey in coalition:
        book.change(hotkey, lambda leaf, hotkey=hotkey: renamed(leaf, hotkey))
    for sample in book.samples:
        path = [book.planned(sample, stage) for stage in range(5)]
        others = [stage for stage in at if path[stage] != 0]
        book.enter(sample, [0 if stage in at else path[stage] for stage in range(5)], only=others, signers=coalition)
    after = book.settle()
    convicted = {finding.hotkey for finding in after.findings}
    assert convicted <= set(coalition)
    left = [hotkey for hotkey in coalition if hotkey not in convicted]
    assert sum(units(after, hotkey) for hotkey in left) <= sum(units(before, hotkey) for hotkey in coalition)
    assert convicted or gain(before, after, coalition) <= 0


def test_two_that_rob_a_sibling_of_its_forward_get_nothing_while_who_sent_it_is_honest() -> None:
    """The consumer says it had the output, which it passes on, from a friend, who fetches the input to show it."""
    book = Book(stages=4, samples=8)
    friend = book.roster.stages[1][0]
    accomplice = book.roster.stages[2][0]
    before = book.settle()
    for sample in book.samples:
        path = [book.planned(sample, stage) for stage in range(4)]
        if path[1:3] == [1, 0]:
            book.enter(sample, [path[0], 0, 0, path[3]], only=(1,), signers=(friend, accomplice))
            book.change(
                accomplice,
                lambda leaf, sample=sample: (
                    replace(leaf, source=0) if leaf.sample == sample and leaf.direction is FORWARD else leaf
                ),
            )
    after = book.settle()
    assert len(book.leaves[friend]) > before.paid[friend].claimed
    assert all(units(after, hotkey) == units(before, hotkey) for hotkey in book.hotkeys)
    assert [finding.hotkey for finding in after.findings] == [accomplice]


def test_all_stages_together_can_invent_a_microbatch() -> None:
    """What only replays and the data audit see, as the module says."""
    book = Book(stages=3, samples=4)
    coalition = first_of(book, range(3))
    before = book.settle()
    book.enter(4, [0, 0, 0], signers=coalition, lie="dream")
    assert gain(before, book.settle(), coalition) == 5


# -- the plan -----------------------------------------------------------------------------------------------------


def flops(settlement: Settlement, book: Book, hotkeys: Sequence[str]) -> float:
    """In forwards of a stage; a tail's unit is both."""
    return sum(
        settlement.paid[hotkey].forward
        + (3 if book.roster.stage_of(hotkey) == len(book.roster.stages) - 1 else 2) * settlement.paid[hotkey].backward
        for hotkey in hotkeys
    )


def strayed(settlement: Settlement, hotkey: str) -> int:
    """Microbatches that pay their sender nothing."""
    return settlement.paid[hotkey].unpaid.get(Unpaid.OFF_PLAN, 0) // 2


def meant(book: Book, head: int, which: Callable[[int], bool]) -> int:
    """How many of a head's forty samples the lottery means for such replicas of the next stage."""
    heads = len(book.roster.stages[0])
    return sum(which(book.planned(sample, 1)) for sample in range(head, 40 * heads, heads))


def test_a_head_that_sends_all_to_a_friend_pays_for_it_and_its_friend_s_sibling_may_do_what_it_gets() -> None:
    plan = Book(stages=3, replicas=2, samples=80)
    deal = Book(
        stages=3,
        samples=80,
        route=lambda sample, stage: 0 if stage == 1 and sample % 2 == 0 else plan.planned(sample, stage),
    )
    head, friend = deal.roster.stages[0][0], deal.roster.stages[1][0]
    settlement = deal.settle()
    off = meant(plan, 0, lambda replica: replica != 0) - int(OFF_PLAN_SHARE * 40)
    assert strayed(settlement, head) == off
    for hotkey in deal.hotkeys:
        assert units(settlement, hotkey) == len(deal.leaves[hotkey]) - 2 * off * (hotkey == head)
    before, allowed = plan.settle(), 3 * int(OFF_PLAN_SHARE * 40)
    assert flops(settlement, deal, (head, friend)) == flops(before, plan, (head, friend)) + allowed


def test_a_coalition_at_all_stages_gains_by_dealing_no_more_than_the_share() -> None:
    plan = Book(stages=4, replicas=3, samples=90)
    deal = Book(
        stages=4,
        replicas=3,
        samples=90,
        route=lambda sample, stage: 0 if sample % 3 == 0 else plan.planned(sample, stage),
    )
    coalition = first_of(deal, range(4))
    before, after = plan.settle(), deal.settle()
    most = sum(3 * (OFF_PLAN_SHARE * len(deal.leaves[hotkey]) / 2 + 1) for hotkey in coalition[:-1])
    assert flops(after, deal, coalition) <= flops(before, plan, coalition) + most


@pytest.mark.parametrize("dealing", [1, 2])
def test_up_to_half_of_the_senders_cannot_excuse_each_other(dealing: int) -> None:
    plan = Book(stages=2, replicas=4, samples=160)
    deal = Book(
        stages=2,
        replicas=4,
        samples=160,
        route=lambda sample, stage: 0 if stage and sample % 4 < dealing else plan.planned(sample, stage),
    )
    settlement = deal.settle()
    for index, head in enumerate(deal.roster.stages[0]):
        off = meant(plan, index, lambda replica: replica != 0) - int(OFF_PLAN_SHARE * 40)
        assert strayed(settlement, head) == (off if index < dealing else 0)


@pytest.mark.parametrize("busy", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("replicas", [2, 4])
def test_what_a_busy_replica_sends_away_pays_its_senders(busy: float, replicas: int) -> None:
    """Each microbatch finds it full with the same probability, whoever sends it."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        plan = Book(stages=2, replicas=replicas, samples=0)

        def route(sample: int, stage: int, rng: np.random.Generator = rng, plan: Book = plan) -> int:
            planned = plan.planned(sample, stage)
            full = stage == 1 and planned == 0 and rng.random() < busy
            return 1 + sample % (replicas - 1) if full else planned

        book = Book(stages=2, replicas=replicas, samples=40 * replicas, route=route)
        settlement = book.settle()
        assert all(units(settlement, hotkey) == len(book.leaves[hotkey]) for hotkey in book.hotkeys), seed


def test_nothing_is_held_against_who_is_alone_or_for_who_is_silent() -> None:
    away = Book(stages=2, replicas=2, samples=40, route=lambda sample, stage: 0 if stage else sample % 2)
    silent = away.roster.stages[1][1]
    heads = away.roster.stages[0]
    assert sum(strayed(away.settle(), head) for head in heads) == 0, "both went away from the same replica"
    assert sum(strayed(away.settle(without=(silent,)), head) for head in heads) == 0
    one = Book(
        stages=2,
        replicas=2,
        samples=40,
        route=lambda sample, stage: away.planned(sample, 1) if stage and sample % 2 else 0 if stage else sample % 2,
    )
    assert strayed(one.settle(), heads[0]) > 0
    assert strayed(one.settle(without=(silent,)), heads[0]) == 0
    assert strayed(one.settle(without=(heads[1],)), heads[0]) == 0


def test_what_excuses_leaving_one_replica_does_not_excuse_leaving_another() -> None:
    """All leave the frozen one; one head leaves a healthy one too."""
    plan = Book(stages=2, replicas=4, samples=0)

    def route(sample: int, stage: int) -> int:
        planned = plan.planned(sample, stage)
        left = stage == 1 and (planned == 0 or (planned == 1 and sample % 4 == 0))
        return 2 + sample // 4 % 2 if left else planned

    book = Book(stages=2, replicas=4, samples=160, route=route)
    settlement = book.settle()
    off = meant(book, 0, lambda replica: replica == 1) - int(OFF_PLAN_SHARE * 40)
    assert [strayed(settlement, head) for head in book.roster.stages[0]] == [off, 0, 0, 0]


def test_receipts_are_of_the_sink_and_nobody_else() -> None:
    book = Book()
    cheat = book.roster.stages[1][0]
    book.change(cheat, lambda leaf: replace(leaf, receipt=NO_RECEIPT))
    assert set(book.settle().paid[cheat].unpaid) == {Unpaid.NO_RECEIPT}
