"""The end of a tempo: run Yuma over the subnet's state, write the columns back, pay out what was emitted.

Emission is one alpha per block: 18 % to the owner, the rest half to miners by incentive and half to validators by
dividends; all of it by stake where there is no incentive. Incentive of the owner's own hotkey is burned, as on the
real chain, whose numbers are also cut off, not rounded, when they are stored as u16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from subnet.localchain import neurons, yuma
from subnet.localchain.dispatch import Context
from subnet.localchain.pallets import commit_reveal, staking

ALPHA_PER_BLOCK = 1_000_000_000
OWNER_CUT = 0.18
U16_MAX = 65_535

_P = "SubtensorModule."


def run(ctx: Context, netuid: int) -> None:
    """Run the subnet's epoch in block `ctx.number` and start the next tempo."""
    state = ctx.state
    last_epoch = state.number(_P + "LastEpochBlock", netuid)
    subnet, hotkeys = _gather(ctx, netuid)
    outcome = yuma.epoch(subnet)
    permits = yuma.top_validators(subnet.stake, state.number(_P + "MaxAllowedValidators", netuid), subnet.owner)
    emission = _pay(ctx, netuid, hotkeys, subnet, outcome, blocks=ctx.number - last_epoch)
    columns: dict[str, list[int] | list[bool]] = {
        "Consensus": _u16(outcome.consensus),
        "Incentive": _u16(outcome.incentive),
        "Dividends": _u16(outcome.dividends),
        "ValidatorTrust": _u16(outcome.trust),
        "ValidatorPermit": [bool(permit) for permit in permits],
        "Active": [bool(active) for active in subnet.active],
        "StakeWeight": _u16(outcome.stake),
        "Emission": emission,
    }
    for name, column in columns.items():
        state.put(_P + name, (netuid,), column)
    bonds = np.where(permits[:, None], outcome.bonds, 0.0)
    for uid, row in enumerate(bonds):
        pairs = [(int(target), value) for target, value in zip(np.nonzero(row)[0], _u16(row[row > 0]), strict=True)]
        if pairs or state.exists(_P + "Bonds", netuid, uid):
            state.put(_P + "Bonds", (netuid, uid), pairs)
    state.put(_P + "LastEpochBlock", (netuid,), ctx.number)
    state.put(_P + "LastMechansimStepBlock", (netuid,), ctx.number)
    state.put(_P + "SubnetEpochIndex", (netuid,), state.number(_P + "SubnetEpochIndex", netuid) + 1)


def activity_cutoff(ctx: Context, netuid: int) -> int:
    """Blocks after which a validator that set no weights counts as inactive."""
    factor = ctx.state.number(_P + "ActivityCutoffFactorMilli", netuid)
    return ctx.state.number(_P + "Tempo", netuid) * factor // 1000


def _gather(ctx: Context, netuid: int) -> tuple[yuma.Subnet, list[str]]:
    state = ctx.state
    hotkeys = neurons.hotkeys(state, netuid)
    last_update = np.array(state.numbers(_P + "LastUpdate", netuid), dtype=np.int64)
    owner_hotkey = state.account(_P + "SubnetOwnerHotkey", netuid)
    owner = hotkeys.index(owner_hotkey) if owner_hotkey in hotkeys else None
    stake = np.array([neurons.stake_of(state, netuid, hotkey) for hotkey in hotkeys], dtype=np.float64)
    too_little = stake < state.number(_P + "StakeThreshold")
    permits = np.array(state.flags(_P + "ValidatorPermit", netuid), dtype=np.bool_)
    if owner is not None:
        too_little[owner] = False
        permits[owner] = True
    last_step = state.number(_P + "LastMechansimStepBlock", netuid)
    registered = [state.number(_P + "BlockAtRegistration", netuid, uid) for uid in range(len(hotkeys))]
    subnet = yuma.Subnet(
        weights=_matrix(ctx, netuid, "Weights", len(hotkeys)),
        bonds=_matrix(ctx, netuid, "Bonds", len(hotkeys)) / U16_MAX,
        stake=np.where(too_little, 0.0, stake),
        permits=permits,
        active=last_update + activity_cutoff(ctx, netuid) >= ctx.number,
        last_update=last_update,
        registered_at=np.array(registered, dtype=np.int64),
        bonds_since=last_step + 1 if last_step else ctx.number - state.number(_P + "Tempo", netuid),
        owner=owner,
        kappa=state.number(_P + "Kappa", netuid) / U16_MAX,
        bonds_rate=1 - state.number(_P + "BondsMovingAverage", netuid) / 1_000_000,
        bonds_penalty=state.number(_P + "BondsPenalty", netuid) / U16_MAX,
        oldest_commit=_oldest_commits(ctx, netuid, hotkeys),
        liquid=_liquid(ctx, netuid),
        yuma3=state.flag(_P + "Yuma3On", netuid),
    )
    return subnet, hotkeys


def _oldest_commits(ctx: Context, netuid: int, hotkeys: list[str]) -> NDArray[np.int64] | None:
    if not ctx.state.flag(_P + "CommitRevealWeightsEnabled", netuid):
        return None
    blocks = np.full(len(hotkeys), np.iinfo(np.int64).max)
    for uid, block in commit_reveal.oldest_commits(ctx.state, netuid, hotkeys, ctx.number).items():
        blocks[uid] = block
    return blocks


def _liquid(ctx: Context, netuid: int) -> yuma.LiquidAlpha | None:
    if not ctx.state.flag(_P + "LiquidAlphaOn", netuid):
        return None
    low, high = ctx.state.numbers(_P + "AlphaValues", netuid)
    return yuma.LiquidAlpha(
        low=low / U16_MAX, high=high / U16_MAX, steepness=ctx.state.number(_P + "AlphaSigmoidSteepness", netuid)
    )


def _matrix(ctx: Context, netuid: int, name: str, size: int) -> yuma.Matrix:
    matrix = np.zeros((size, size))
    for uid in range(size):
        for target, value in ctx.state.pairs(_P + name, netuid, uid):
            if target < size:
                matrix[uid, target] = value
    return matrix


def _pay(
    ctx: Context,
    netuid: int,
    hotkeys: list[str],
    subnet: yuma.Subnet,
    outcome: yuma.Outcome,
    *,
    blocks: int,
) -> list[int]:
    """Credit the emission of `blocks` blocks. Returns what each uid got this tempo, in rao of alpha."""
    emitted = blocks * ALPHA_PER_BLOCK
    owner_cut = int(emitted * OWNER_CUT)
    rest = emitted - owner_cut
    mining = outcome.incentive / max(1.0, float(outcome.incentive.sum() + outcome.dividends.sum()))
    emission = []
    for uid, hotkey in enumerate(hotkeys):
        mined = int(rest * mining[uid])
        earned = int(rest * outcome.emission[uid]) - mined
        emission.append(mined + earned)
        coldkey = ctx.state.account(_P + "Owner", hotkey)
        if mined and coldkey is not None and uid != subnet.owner:
            staking.credit(ctx, netuid, hotkey, coldkey, mined)
        if earned:
            pool = ctx.state.number(_P + "TotalHotkeyAlpha", hotkey, netuid)
            ctx.state.put(_P + "TotalHotkeyAlpha", (hotkey, netuid), pool + earned)
    owner_hotkey = ctx.state.account(_P + "SubnetOwnerHotkey", netuid)
    owner_coldkey = ctx.state.account(_P + "SubnetOwner", netuid)
    if owner_hotkey is not None and owner_coldkey is not None:
        staking.credit(ctx, netuid, owner_hotkey, owner_coldkey, owner_cut)
    return emission


def _u16(values: NDArray[np.float64]) -> list[int]:
    """Proportions as the chain stores them. The epsilon makes up for float64's own rounding, not for the chain's."""
    return [int(value) for value in np.floor(np.clip(values, 0.0, 1.0) * U16_MAX + 1e-6)]
