"""Stages: names, initial weights that do not depend on the split, digests, flat vectors, input checks."""

from dataclasses import replace

import pytest
import torch

from model.config import BoundaryConfig, BoundaryForm, ModelConfig, preset
from model.split import split
from model.stage import StageInputError, assign_flat, build_stage, flatten, unflatten, weights_digest

_FORM_B = BoundaryConfig(form=BoundaryForm.B, width=4)
_SMALL = ModelConfig(vocab=32, hidden=16, layers=4, heads=2, kv_heads=1, ffn=24, context=8, boundary=_FORM_B)


def _weights(config: ModelConfig, stages: int, seed: int = 7) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for plan in split(config, stages):
        own = build_stage(config, plan, seed).state_dict()
        assert weights.keys().isdisjoint(own)
        weights |= own
    return weights


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_split_starts_from_the_same_model(stages: int) -> None:
    whole, parts = _weights(_SMALL, 1), _weights(_SMALL, stages)
    core = {name: value for name, value in parts.items() if not name.startswith("boundaries.")}
    assert core.keys() == whole.keys()
    assert all(torch.equal(whole[name], core[name]) for name in whole)
    assert {"embedding.weight", "layers.3.attention.q.weight", "norm.weight", "head.weight"} <= whole.keys()


def test_initial_weights_follow_their_deviation_and_seed() -> None:
    weights = _weights(preset("nano"), 2)
    assert torch.equal(weights["layers.0.ffn_norm.weight"], torch.ones(128))
    for name, deviation in {
        "embedding.weight": 1.0,
        "head.weight": 0.25 * 128**-0.5,
        "layers.3.attention.q.weight": 128**-0.5,
        "layers.3.ffn.down.weight": 384**-0.5 / 4,
        "boundaries.4.sender.encoder.weight": 128**-0.5,
        "boundaries.4.receiver.decoder.weight": 8**-0.5,
    }.items():
        assert float(weights[name].std()) == pytest.approx(deviation, rel=0.04), name
        assert abs(float(weights[name].mean())) < 0.1 * deviation, name
    other = _weights(preset("nano"), 2, seed=8)
    assert not torch.equal(weights["head.weight"], other["head.weight"])
    assert not torch.equal(weights["layers.0.ffn.up.weight"], weights["layers.1.ffn.up.weight"])
    assert float(_weights(_SMALL, 2)["boundaries.2.sender.encoder.0.weight"].std()) == pytest.approx(0.01, rel=0.1)


def test_initial_weights_are_these_very_bits() -> None:
    # Recorded: any change of drawing, naming or seeding makes nodes disagree on the first weights of a run.
    stage = build_stage(_SMALL, split(_SMALL, 2)[0], 1)
    assert weights_digest(stage).hex() == "884312d9a7508934118ed27c489d2c78ef1821cdb635a6a63ab6f899e4c6631e"


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_stage(_SMALL, split(_SMALL, 2)[0], 1)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_keeps_norms_and_positions_in_fp32() -> None:
    plan = split(_SMALL, 1)[0]
    stage = build_stage(_SMALL, plan, 1, dtype=torch.bfloat16)
    assert stage.dtype == torch.bfloat16
    assert stage.norm.weight.dtype == stage.rotary.dtype == torch.float32
    tokens = torch.arange(16).view(2, 8)
    logits = stage(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), build_stage(_SMALL, plan, 1)(tokens), atol=0.02, rtol=0.05)


def test_digest_changes_with_one_bit_and_with_nothing_else() -> None:
    plan = split(_SMALL, 2)[1]
    stage, twin = build_stage(_SMALL, plan, 1), build_stage(_SMALL, plan, 1)
    assert weights_digest(stage) == weights_digest(twin)
    assert len(weights_digest(stage)) == 32
    with torch.no_grad():
        twin.head.weight.view(torch.int32)[3, 5] ^= 1
    assert weights_digest(stage) != weights_digest(twin)


def test_flatten_and_assign_are_inverse() -> None:
    plan = split(_SMALL, 2)[0]
    stage, other = build_stage(_SMALL, plan, 1), build_stage(_SMALL, plan, 2)
    flat = flatten(stage)
    assert all(torch.equal(part, stage.get_parameter(name)) for name, part in unflatten(stage, flat).items())
    first = min(name for name, _ in stage.named_parameters())
    assert torch.equal(flat[: stage.get_parameter(first).numel()], stage.get_parameter(first).detach().flatten())
    assign_flat(other, flat)
    assert weights_digest(other) == weights_digest(stage)
    with pytest.raises(StageInputError, match="flat weights have shape"):
        assign_flat(other, flat[1:])


@pytest.mark.parametrize(
    ("index", "x"),
    [
        (0, torch.zeros(2, 3)),
        (0, torch.zeros(2, 3, 4, dtype=torch.int64)),
        (0, torch.zeros(2, 9, dtype=torch.int64)),
        (1, torch.zeros(2, 3, 5)),
        (1, torch.zeros(2, 3, 4, dtype=torch.float64)),
        (1, torch.zeros(0, 3, 4)),
        (1, torch.zeros(2, 3, dtype=torch.int64)),
    ],
)
def test_an_input_that_does_not_fit_is_refused(index: int, x: torch.Tensor) -> None:
    stage = build_stage(_SMALL, split(_SMALL, 2)[index], 1)
    with pytest.raises(StageInputError, match=f"stage {index} got"):
        stage(x)


def test_only_the_last_stage_has_a_loss_and_targets_must_fit() -> None:
    first, last = (build_stage(_SMALL, plan, 1) for plan in split(_SMALL, 2))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(StageInputError, match="has no loss"):
        first.loss(tokens, tokens)
    with pytest.raises(StageInputError, match="targets are"):
        last.loss(first(tokens), tokens[:, :2])


def test_an_untrained_model_guesses_uniformly() -> None:
    config = replace(preset("nano"), boundary=BoundaryConfig())
    stage = build_stage(config, split(config, 1)[0], 1)
    tokens = torch.randint(1_024, (2, 65), generator=torch.Generator().manual_seed(0))
    assert float(stage.loss(tokens[:, :-1], tokens[:, 1:]).detach()) == pytest.approx(6.93, abs=0.15)
