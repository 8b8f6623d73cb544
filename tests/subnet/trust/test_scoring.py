"""A unit pays once, only if linked and receipted; nobody loses pay through another's silence."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from subnet.identity import Identity, verify
from subnet.swarm.roster import Roster
from subnet.trust.ledger import (
    NO_DIGEST,
    NO_PEER,
    Direction,
    Evidence,
    Leaf,
    LedgerError,
    Window,
    digest,
    evidence_root,
    receipt_message,
)
from subnet.trust.scoring import Settlement, score, settle, weights

RUN = b"run-0001"
STAGES, REPLICAS, SAMPLES = 3, 2, 8
KEYS = {key.hotkey: key for key in (Identity.from_uri(f"//score-{i}") for i in range(STAGES * REPLICAS))}
HOTKEYS = list(KEYS)
ROSTER = Roster.of([HOTKEYS[s * REPLICAS : (s + 1) * REPLICAS] for s in range(STAGES)])


def tag(*parts: object) -> bytes:
    return digest("/".join(map(str, parts)).encode())


def receipted(leaf: Leaf, producer: str, consumer: str) -> Leaf:
    message = receipt_message(RUN, 0, producer=producer, key=leaf.key, stage=leaf.stage, output=leaf.output)
    return replace(leaf, receipt=KEYS[consumer].sign(message))


def honest() -> dict[str, list[Leaf]]:
    """Sample k of head k % 2 goes through replica (k // 2) % 2 of every later stage."""
    book: dict[str, list[Leaf]] = {hotkey: [] for hotkey in HOTKEYS}
    for sample in range(SAMPLES):
        path = [sample % 2, (sample // 2) % 2, (sample // 2) % 2]
        holders = [ROSTER.stages[stage][path[stage]] for stage in range(STAGES)]
        for stage, hotkey in enumerate(holders):
            first, last = stage == 0, stage == STAGES - 1
            x = tag("tokens", sample) if first else tag("y", stage - 1, sample)
            if not last:
                forward = Leaf(
                    direction=Direction.FORWARD,
                    stage=stage,
                    sample=sample,
                    version=0,
                    source=NO_PEER if first else path[stage - 1],
                    sink=path[stage + 1],
                    input=x,
                    output=tag("y", stage, sample),
                )
                book[hotkey].append(receipted(forward, hotkey, holders[stage + 1]))
            backward = Leaf(
                direction=Direction.BACKWARD,
                stage=stage,
                sample=sample,
                version=0,
                source=path[stage - 1] if last else path[stage + 1],
                sink=NO_PEER if first else path[stage - 1],
                loss=1.5,
                input=x,
                gradient=NO_DIGEST if last else tag("dx", stage + 1, sample),
                output=NO_DIGEST if first else tag("dx", stage, sample),
            )
            book[hotkey].append(backward if first else receipted(backward, hotkey, holders[stage - 1]))
    return book


def evidence(book: dict[str, list[Leaf]]) -> dict[str, Evidence]:
    return {hotkey: Evidence(tuple(leaves), (Window(0, len(leaves), b"w" * 32),)) for hotkey, leaves in book.items()}


def judged(book: dict[str, list[Leaf]], *, without: tuple[str, ...] = ()) -> Settlement:
    tables = {hotkey: table for hotkey, table in evidence(book).items() if hotkey not in without}
    return settle(RUN, ROSTER, tables, verify, first_sample=0)


def units(settlement: Settlement, hotkey: str) -> int:
    return settlement.paid[hotkey].forward + settlement.paid[hotkey].backward


def test_honest_work_is_paid_whole() -> None:
    settlement = judged(honest())
    assert all(units(settlement, hotkey) == settlement.paid[hotkey].claimed > 0 for hotkey in HOTKEYS)
    assert len(settlement.pathways) == SAMPLES
    assert all(path.loss == 1.5 for path in settlement.pathways)


def test_forged_receipts_pay_nothing() -> None:
    book = honest()
    cheat = ROSTER.stages[1][0]
    own = [replace(leaf, receipt=KEYS[cheat].sign(b"trust me")) for leaf in book[cheat]]
    settlement = judged({**book, cheat: own})
    assert units(settlement, cheat) == 0
    assert units(settlement, ROSTER.stages[1][1]) > 0


def test_invented_input_pays_nothing() -> None:
    book = honest()
    cheat = ROSTER.stages[1][0]
    invented = [
        replace(leaf, input=tag("dream", leaf.sample)) if leaf.direction is Direction.FORWARD else leaf
        for leaf in book[cheat]
    ]
    settlement = judged({**book, cheat: invented})
    assert settlement.paid[cheat].forward == 0
    assert settlement.paid[cheat].backward > 0


def test_a_head_is_paid_for_its_own_samples_only() -> None:
    book = honest()
    one, two = ROSTER.stages[0]
    settlement = judged({**book, one: book[two], two: []})
    assert units(settlement, one) == 0


def test_work_that_never_came_back_pays_nothing() -> None:
    book = honest()
    head = ROSTER.stages[0][0]
    book[head] = [leaf for leaf in book[head] if leaf.direction is Direction.FORWARD]
    settlement = judged(book)
    assert units(settlement, head) == 0
    assert sum(units(settlement, hotkey) for hotkey in ROSTER.stages[2]) == SAMPLES // 2


def test_a_copied_unit_pays_only_who_did_it() -> None:
    book = honest()
    real, copy = ROSTER.stages[1]
    settlement = judged({**book, copy: [*book[copy], *book[real]]})
    assert units(settlement, real) == len(book[real])
    assert units(settlement, copy) == len(book[copy])


def test_a_unit_taken_over_from_a_silent_head_pays_the_one_that_was_sent_the_gradient() -> None:
    book = honest()
    dead, heir = ROSTER.stages[0]
    mine = [leaf for leaf in book[dead] if leaf.direction is Direction.BACKWARD][:2]
    for hotkey in ROSTER.stages[1]:
        book[hotkey] = [
            receipted(replace(leaf, sink=1), hotkey, heir)
            if leaf.direction is Direction.BACKWARD and leaf.sample in {taken.sample for taken in mine}
            else leaf
            for leaf in book[hotkey]
        ]
    own = units(judged(book), heir)
    settlement = judged({**book, heir: [*book[heir], *mine]}, without=(dead,))
    assert units(settlement, heir) == own + len(mine)
    assert units(judged({**book, heir: [*book[heir], *mine]}), heir) == own


def test_a_microbatch_started_for_a_silent_head_pays_its_heir_as_if_it_were_its_own() -> None:
    """Taken over whole: forward and backward leaf, both receipted; with the owner's evidence there it pays nothing."""
    book = honest()
    dead, heir = ROSTER.stages[0]
    mine = [leaf for leaf in book[dead] if leaf.sample < 2]
    assert len(mine) == 2
    body = ROSTER.stages[1][mine[0].sink]
    forwards = [leaf for leaf in mine if leaf.direction is Direction.FORWARD]
    taken = [receipted(leaf, heir, body) if leaf in forwards else leaf for leaf in mine]
    book[body] = [
        replace(leaf, source=1)
        if leaf.sample < 2 and leaf.direction is Direction.FORWARD
        else receipted(replace(leaf, sink=1), body, heir)
        if leaf.sample < 2
        else leaf
        for leaf in book[body]
    ]
    own = units(judged(book, without=(dead,)), heir)
    with_taken = {**book, heir: [*book[heir], *taken]}
    settlement = judged(with_taken, without=(dead,))
    assert units(settlement, heir) == own + 2 == settlement.paid[heir].claimed
    assert units(settlement, body) == len(book[body])
    assert units(judged(with_taken), heir) == own, "the owner is there"
    assert units(judged(with_taken, without=(dead, body)), heir) == units(judged(book, without=(dead, body)), heir)
    unsigned = [replace(leaf, receipt=b"x" * 64) if leaf in taken[:1] else leaf for leaf in with_taken[heir]]
    assert (
        judged({**book, heir: unsigned}, without=(dead,)).paid[heir].forward
        == judged(book, without=(dead,)).paid[heir].forward
    )


def test_a_silent_neighbour_takes_nobody_s_pay() -> None:
    for silent in HOTKEYS:
        settlement = judged(honest(), without=(silent,))
        assert silent not in settlement.paid
        for hotkey in settlement.paid:
            assert units(settlement, hotkey) == settlement.paid[hotkey].claimed, (silent, hotkey)


def test_leaves_for_stages_one_does_not_hold_change_nobody_s_pay() -> None:
    book = honest()
    before = judged(book)
    cheat = ROSTER.stages[1][0]
    everything = [leaf for leaves in book.values() for leaf in leaves]
    after = judged({**book, cheat: [*everything, *book[cheat]]})
    for hotkey in HOTKEYS:
        assert units(after, hotkey) == units(before, hotkey), hotkey


def test_only_a_head_can_say_that_a_microbatch_came_back() -> None:
    book = honest()
    for head in ROSTER.stages[0]:
        book[head] = [leaf for leaf in book[head] if leaf.direction is Direction.FORWARD]
    cheat = ROSTER.stages[1][0]
    fake = [
        Leaf(direction=Direction.BACKWARD, stage=0, sample=sample, version=0, source=0, loss=0.1)
        for sample in range(SAMPLES)
    ]
    settlement = judged({**book, cheat: [*book[cheat], *fake]})
    assert not settlement.pathways
    assert all(units(settlement, hotkey) == 0 for hotkey in HOTKEYS)


def test_serving_no_evidence_earns_nothing_and_counts() -> None:
    silent = HOTKEYS[0]
    flops = dict.fromkeys(HOTKEYS, 1.0)
    whole = score(judged(honest()), forward_flops=flops, correctness={})
    without = score(judged(honest(), without=(silent,)), forward_flops=flops, correctness={})
    assert without[silent].value == 0.0
    twin = next(hotkey for hotkey in HOTKEYS[1:] if whole[hotkey].value == whole[silent].value)
    shares = weights([whole, without, without], rounds=3)
    assert shares[silent] == pytest.approx(shares[twin] / 3)


def sound(leaves: list[Leaf]) -> Evidence:
    """Evidence with the window table an honest ledger would have."""
    versions = sorted({leaf.version for leaf in leaves})
    backward = [leaf.version for leaf in leaves if leaf.direction is Direction.BACKWARD]
    return Evidence(tuple(leaves), tuple(Window(version, backward.count(version), b"w" * 32) for version in versions))


def test_honest_evidence_is_sound() -> None:
    for stage, replicas in enumerate(ROSTER.stages):
        for hotkey in replicas:
            sound(honest()[hotkey]).check(stage=stage, samples=range(SAMPLES))
    Evidence((), ()).check(stage=0, samples=range(SAMPLES))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda leaves: [replace(leaves[0], stage=2), *leaves[1:]],
        lambda leaves: [replace(leaves[0], sample=2**63), *leaves[1:]],
        lambda leaves: [*leaves, leaves[0]],
        lambda leaves: [replace(leaves[0], loss=float("nan")), *leaves[1:]],
        lambda leaves: [replace(leaves[0], loss=1e38), *leaves[1:]],
        lambda leaves: [replace(leaves[0], version=10**6), *leaves[1:]],
    ],
)
def test_evidence_that_cannot_be_is_refused(spoil: Callable[[list[Leaf]], list[Leaf]]) -> None:
    leaves = honest()[ROSTER.stages[1][0]]
    with pytest.raises(LedgerError):
        sound(spoil(leaves)).check(stage=1, samples=range(SAMPLES))


@pytest.mark.parametrize(
    "windows",
    [
        (),
        (Window(0, 99, b"w" * 32),),
        (Window(0, 4, b"w" * 32), Window(0, 4, b"w" * 32)),
        (Window(0, 4, b"w" * 32), Window(1, 0, b"w" * 32)),
        (Window(7, 4, b"w" * 32),),
    ],
)
def test_windows_are_those_of_the_leaves(windows: tuple[Window, ...]) -> None:
    leaves = tuple(honest()[ROSTER.stages[1][0]])
    assert sum(leaf.direction is Direction.BACKWARD for leaf in leaves) == 4
    with pytest.raises(LedgerError, match="window"):
        Evidence(leaves, windows).check(stage=1, samples=range(SAMPLES))


def test_tables_round_trip_and_their_root_binds_every_byte() -> None:
    table = evidence(honest())[HOTKEYS[0]]
    leaves, windows = table.tables()
    assert Evidence.parse(leaves, windows).root == table.root == evidence_root(leaves, windows)
    for position in range(0, len(leaves), 37):
        altered = bytearray(leaves)
        altered[position] ^= 1
        assert evidence_root(altered, windows) != table.root
    with pytest.raises(LedgerError, match="whole rows"):
        Evidence.parse(leaves[:-1], windows)
    with pytest.raises(LedgerError, match="direction 9"):
        Evidence.parse(b"\x09" + leaves[1:], windows)


def test_score_is_flops_times_correctness_and_weights_are_their_mean() -> None:
    settlement = judged(honest())
    flops = dict.fromkeys(HOTKEYS, 10.0)
    cheat = HOTKEYS[0]
    scores = score(settlement, forward_flops=flops, correctness={cheat: 0.0})
    paid = settlement.paid[HOTKEYS[1]]
    assert scores[HOTKEYS[1]].value == 10.0 * (paid.forward + 2 * paid.backward)
    assert scores[cheat].value == 0.0
    shares = weights([scores], rounds=3)
    assert cheat not in shares
    assert sum(shares.values()) == pytest.approx(1.0)
    newcomer = {**scores, "new": replace(scores[HOTKEYS[1]], hotkey="new")}
    assert weights([scores, newcomer], rounds=3)["new"] == pytest.approx(
        weights([scores, newcomer], rounds=3)[HOTKEYS[1]]
    )
    assert weights([{cheat: scores[cheat]}], rounds=3) == {}
