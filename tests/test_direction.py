"""Which way is better is never guessed from a name."""

import numpy as np
import pytest

import playbook_optax as pbx
from playbook_optax import _direction

RISING = (
    "acc",
    "val_acc",
    "valAcc",
    "valid/accuracy",
    "accuracy_top1",
    "top1",
    "top_5_acc",
    "f1",
    "macro_f1",
    "mAP",
    "mAP@50",
    "auroc",
    "AUC",
    "r2",
    "PSNR",
    "ssim",
    "log_likelihood",
    "elbo",
    "bleu",
    "ndcg@10",
    "mrr",
    "reward",
    "mean_return",
    "score",
    "IoU",
    "exact_match",
    "pass@1",
)
NOT_RISING = (
    "loss",
    "valid/loss",
    "error_rate",
    "top1_error",
    "brier_score",
    "nll",
    "neg_log_likelihood",
    "perplexity",
    "rmse",
    "accuracy/loss",
    "scores/error",
    "accelerator_seconds",
    "mapping",
    "recalled",
    "map_error",
    "f",
    "1",
    "",
    "latency",
    "value",
)


@pytest.mark.parametrize("name", RISING)
def test_names_of_what_should_rise(name):
    assert _direction.suggests_rising(name)


@pytest.mark.parametrize("name", NOT_RISING)
def test_names_that_say_nothing_or_the_opposite(name):
    assert not _direction.suggests_rising(name)


def a_study(metric, **more):
    table = {"valid/loss": [[1.0], [2.0], [3.0]], metric: [[0.9], [0.5], [0.1]]}
    return pbx.Study.from_arrays(
        {"lr": [0.1, 0.2, 0.3]}, table, [10], **{"objective": "valid/loss", **more}
    )


@pytest.mark.parametrize("name", ["val_acc", "ndcg"])
def test_the_direction_is_asked_for_everywhere(name):
    asked = pytest.raises(ValueError, match=rf"maximize must be given for .*= '(final/)?{name}'")
    study = a_study(name)
    with asked:
        study.best(name)
    with asked:
        pbx.steps_to_target(study, 0.4, metric=name)
    with asked:
        pbx.diagnose(study, name)
    with asked:
        a_study(name, objective=name)
    with asked:
        pbx.Study.from_dataframe(study.to_dataframe(), objective=f"final/{name}", parameters=["lr"])
    with asked:
        pbx.Workload(
            name="w",
            init=lambda key: ({}, {}),
            loss=lambda p, s, b, k: (0.0, (s, {})),
            batch=lambda d, k, i: (),
            evaluate=lambda p, s, d: {name: 0.0},
            objective=name,
        )
    assert study.best(name, maximize=True).trial == 0
    assert study.best(name, maximize=False).trial == 2
    assert a_study(name, objective=name, maximize=True).best().trial == 0


def test_steps_to_a_target_that_is_reached_from_below():
    curves = np.array([[0.5, 0.7, 0.8], [0.5, 0.9, 0.7], [0.2, 0.3, 0.4]])
    study = pbx.Study.from_arrays(
        {"lr": [0.1, 0.2, 0.3]},
        {"valid/loss": 1 - curves, "val_acc": curves},
        [0, 5, 10],
        objective="valid/loss",
    )
    found = pbx.steps_to_target(study, 0.8, metric="val_acc", maximize=True)
    assert found.steps.tolist() == [10, 5, -1]


def test_brier_score_is_minimized():
    assert a_study("brier_score").best("brier_score").trial == 2


def test_a_direction_is_true_or_false():
    with pytest.raises(TypeError, match="maximize must be True or False"):
        a_study("acc", maximize="yes")
