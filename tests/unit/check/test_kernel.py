"""What is tried in a throw-away namespace, for root and for others."""

import pytest
from doctor import USERS, case, levels
from plans import PLAN

from tproxy_relay.check import kernel
from tproxy_relay.check.namespace import Namespace
from tproxy_relay.intercept import backends


@pytest.mark.parametrize("user", USERS)
def test_features_are_told_apart(possible: None, user: bool) -> None:
    hook = "filter hook prerouting priority mangle"
    with Namespace(user=user) as namespace:
        for module, feature in kernel.FEATURES.items():
            assert kernel.works(namespace, *feature), module
        assert not kernel.works(namespace, hook, "meta l4proto tcp frobnicate")
        assert not kernel.works(namespace, "filter hook output priority mangle", "meta l4proto tcp tproxy to :1")
        assert namespace.run(["nft", "list", "ruleset"]) == ""


@pytest.mark.usefixtures("network")
def test_this_kernel_can_do_it() -> None:
    assert levels([*kernel.probe_kernel(case())]) == [("transparent-sockets", "ok"), ("kernel", "ok"), ("kernel", "ok")]
    assert not [*kernel.probe_kernel(case(mode="redirect", intercept_inbound=()))]


def test_the_trial_is_of_one_host_with_itself() -> None:
    trial = kernel.trial_plan(PLAN)
    assert not trial.inbound and len(trial.outbound) == 1 and trial.on_failure == "closed"
    assert (trial.mark_mask, trial.route_table) == (PLAN.mark_mask, PLAN.route_table), "the numbers are the plan's"


@pytest.mark.usefixtures("network")
def test_what_is_there_does_not_show_in_what_would_be_done_to_nothing() -> None:
    where = backends.of_name("iptables-nft")
    before = kernel.steps_from_nothing(PLAN, where)
    where.install(PLAN, "active")
    assert kernel.steps_from_nothing(PLAN, where) == before
