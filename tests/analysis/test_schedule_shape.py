"""The pitfall of longer rounds, for each family extended the right way and the wrong ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from playbook_optax import schedules
from playbook_optax.analysis.schedule_shape import longer_schedule_findings, schedule_info

SHORT, LONG = 100, 1000


def share(schedule, longer, short=SHORT, long=LONG):
    """Share of the extra steps that are too small; 0 without a finding."""
    found = longer_schedule_findings(schedule, short, longer, long)
    return found[0].evidence["excess_share"] if found else 0.0


FAMILIES = {
    "constant": schedules.constant(0.3),
    "linear": schedules.linear_decay(0.3, SHORT),
    "linear after a hold": schedules.linear_decay(0.3, SHORT // 2, SHORT // 2),
    "cosine": schedules.cosine_decay(0.3, SHORT),
    "polynomial": schedules.polynomial_decay(0.3, SHORT, power=2.0),
    "warmed-up linear": schedules.prepend_warmup(schedules.linear_decay(0.3, SHORT - 20), 20),
    "warmed-up cosine": schedules.prepend_warmup(schedules.cosine_decay(0.3, SHORT - 20), 20),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_playbooks_own_extension_is_never_the_pitfall(family):
    schedule = FAMILIES[family]
    assert share(schedule, schedules.extend_for_longer_run(schedule, LONG - SHORT)) == 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "constant"])
def test_a_schedule_that_is_left_as_it_is_wastes_nearly_all_extra_steps(family):
    schedule = FAMILIES[family]
    # A stretched cosine is small for 30% of its extra steps by rule.
    assert share(schedule, schedule) > (0.65 if "cosine" in family else 0.99)


def test_a_constant_left_as_it_is_wastes_nothing():
    assert share(FAMILIES["constant"], schedules.constant(0.3)) == 0
    assert share(FAMILIES["constant"], schedules.linear_decay(0.3, LONG)) > 0.19


@pytest.mark.parametrize("growth", [1.5, 3, 10, 30])
def test_a_stretched_linear_decay_is_the_pitfall_at_any_growth(growth):
    long = round(SHORT * growth)
    stretched = schedules.linear_decay(0.3, long)
    assert share(FAMILIES["linear"], stretched, long=long) == pytest.approx(0.2, abs=0.03)


def test_a_cosine_that_decays_early_is():
    early = schedules.cosine_decay(0.3, LONG // 2)
    assert share(FAMILIES["cosine"], early) > 0.3


def test_without_a_rule_the_share_of_the_shorter_run_is_the_measure():
    """The playbook's example: a square root tuned on few steps, then used for many."""
    root = schedules.inverse_sqrt_decay(0.3, SHORT)
    assert share(root, root, long=100 * SHORT) > 0.7
    assert share(lambda count: 0.3 * (1 - count / SHORT), lambda c: 0.3 * (1 - c / LONG)) == 0
    assert share(lambda count: 0.3, lambda count: jnp.where(count < 500, 0.3, 0.0)) > 0.5


def test_info_in_closed_form():
    info = schedule_info(schedules.linear_decay(2.0, 10), 10, small=0.35)
    # Rates 2.0, 1.8, ..., 0.2: those below 0.7 are 0.6, 0.4 and 0.2.
    assert (info.num_steps, info.peak, info.peak_step, info.num_small) == (10, 2.0, 0, 3)
    np.testing.assert_allclose((info.last, info.mean_share, info.small_share), (0.2, 0.55, 0.3))
    warm = schedule_info(schedules.prepend_warmup(schedules.constant(1.0), 60), 100)
    assert (warm.num_small, warm.peak_step, warm.mean_share) == (0, 60, 1.0)
    nothing = schedule_info(schedules.constant(0.0), 5)
    assert (nothing.peak, nothing.mean_share, nothing.num_small) == (0.0, 0.0, 0)


def test_a_very_long_run_is_sampled():
    info = schedule_info(schedules.linear_decay(1.0, 10**8), 10**8)
    assert info.num_small == pytest.approx(2e7, rel=1e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"longer_num_steps must be > num_steps = 100, got 100"):
        share(FAMILIES["linear"], FAMILIES["linear"], long=100)
    with pytest.raises(ValueError, match=r"schedule\(3\) is -0.5"):
        schedule_info(lambda count: jnp.where(count == 3, -0.5, 1.0), 10)
    with pytest.raises(ValueError, match="function count -> value"):
        schedule_info(0.1, 10)
    with pytest.raises(ValueError, match="small must be > 0 and < 1"):
        schedule_info(schedules.constant(1.0), 10, small=1.0)
