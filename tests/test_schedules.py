"""Schedules against the published tables of the systems they follow, and against their own definitions."""

import math

import pytest

from fastssl.schedules import learning_rate, momentum_schedule

# Learning rate by epoch, as the reference training scripts give it.
STEP_003 = {
    0: 0.03,
    50: 0.03,
    119: 0.03,
    120: 0.003,
    159: 0.003,
    160: 0.00030000000000000003,
    199: 0.00030000000000000003,
}
COSINE_003_200 = {
    0: 0.03,
    1: 0.029998149487224908,
    2: 0.029992598405485973,
    50: 0.02560660171779821,
    100: 0.015,
    119: 0.010589395121515442,
    120: 0.010364745084375793,
    121: 0.010141238727027758,
    159: 0.003004730122693641,
    160: 0.00286474508437579,
    199: 1.8505127750911841e-06,
}
COSINE_006_240 = {
    0: 0.06,
    60: 0.05121320343559642,
    120: 0.030000000000000006,
    180: 0.008786796564403575,
    239: 2.570172779789992e-06,
}
COSINE_006_800 = {
    0: 0.06,
    1: 0.05999976868144411,
    200: 0.05121320343559642,
    400: 0.03,
    600: 0.008786796564403575,
    799: 2.3131855588331972e-07,
}
LINEAR_30 = {0: 30.0, 59: 30.0, 60: 3.0, 79: 3.0, 80: 0.30000000000000004, 99: 0.30000000000000004}
FINETUNE_01 = {
    0: 0.1,
    59: 0.1,
    60: 0.020000000000000004,
    79: 0.020000000000000004,
    80: 0.004000000000000001,
    99: 0.004000000000000001,
}


@pytest.mark.parametrize(
    "table, options",
    [
        (STEP_003, dict(base_lr=0.03, epochs=200, schedule="step")),
        (COSINE_003_200, dict(base_lr=0.03, epochs=200)),
        (COSINE_006_240, dict(base_lr=0.06, epochs=240)),
        (COSINE_006_800, dict(base_lr=0.06, epochs=800)),
        (LINEAR_30, dict(base_lr=30.0, epochs=100, schedule="step", milestones=(60, 80))),
        (FINETUNE_01, dict(base_lr=0.1, epochs=100, schedule="step", milestones=(60, 80), drop=0.2)),
    ],
)
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_reference_tables(table, options, steps_per_epoch):
    for epoch, lr in table.items():
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):  # first and last of the epoch
            got = learning_rate(step, steps_per_epoch=steps_per_epoch, **options)
            assert got == pytest.approx(lr, rel=1e-14, abs=0)


def test_warmup_rises_by_the_step_then_the_cosine_covers_the_rest():
    options = dict(base_lr=0.8, epochs=12, steps_per_epoch=5, warmup_epochs=2)
    lrs = [learning_rate(s, **options) for s in range(60)]
    assert lrs[:10] == pytest.approx([0.8 * (s + 1) / 10 for s in range(10)])
    assert lrs[10] == 0.8
    assert lrs[35] == pytest.approx(0.4)  # half-way through the remaining 10 epochs
    assert lrs[59] == pytest.approx(0.4 * (1 + math.cos(math.pi * 9 / 10)))


def test_warmup_of_part_of_an_epoch_never_overshoots():
    lrs = [learning_rate(s, base_lr=1.0, epochs=4, steps_per_epoch=4, warmup_epochs=1.5) for s in range(16)]
    assert lrs[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert lrs[6:8] == [1.0, 1.0]  # the second epoch began before the warm-up ended
    assert lrs[8] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5 / 2.5)))
    less_than_a_step = learning_rate(0, base_lr=1.0, epochs=1, steps_per_epoch=2, warmup_epochs=0.1)
    assert less_than_a_step == 1.0


def test_constant_and_step():
    assert learning_rate(10**6, base_lr=0.1, epochs=3, steps_per_epoch=5, schedule="constant") == 0.1
    drops = dict(base_lr=1.0, epochs=9, steps_per_epoch=2, schedule="step", milestones=(3, 3, 5), drop=0.5)
    assert [learning_rate(s, **drops) for s in (5, 6, 10)] == [1.0, 0.25, 0.125]
    warm = [
        learning_rate(s, base_lr=1.0, epochs=9, steps_per_epoch=2, schedule="step", warmup_epochs=1) for s in (0, 1, 2)
    ]
    assert warm == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "cos"}, "unknown schedule 'cos': choose cosine, step or constant"),
        ({"epochs": 0}, "at least 1 epoch and 1 step per epoch, got 0 and 5"),
        ({"steps_per_epoch": 0}, "got 3 and 0"),
        ({"warmup_epochs": 3}, "warm-up must be shorter than training: 3 of 3 epochs"),
        ({"warmup_epochs": -1.0}, "warm-up must be shorter"),
    ],
)
def test_misuse_is_one_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(0, **{"base_lr": 0.1, "epochs": 3, "steps_per_epoch": 5, **options})


def test_momentum_schedules():
    assert momentum_schedule(77, momentum=0.99, total_steps=100) == 0.99
    cosine = [momentum_schedule(s, momentum=0.99, total_steps=100, schedule="cosine") for s in (0, 25, 50, 100, 130)]
    expected = [0.99, 1 - 0.01 * (math.cos(math.pi / 4) + 1) / 2, 0.995, 1.0, 1.0]
    assert cosine == pytest.approx(expected, rel=1e-14)
    for options, message in [
        ({"schedule": "linear"}, "unknown momentum schedule 'linear': choose constant or cosine"),
        ({"momentum": 1.5}, "must lie between 0 and 1, got 1.5"),
        ({"total_steps": 0}, "at least 1 step, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            momentum_schedule(0, **{"momentum": 0.9, "total_steps": 10, **options})
