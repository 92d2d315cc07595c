"""Faults too big for the other lanes: drivers killed, nodes lost and found. All kinds: benchmarks/faults.py."""

import pytest
from faults import Campaign
from object_store import ObjectStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), seed=1, store=object_store)


@pytest.mark.parametrize("kind", ["driver", "data task"])
def test_a_run_comes_out_as_if_nothing_had_happened(campaign: Campaign, kind: str) -> None:
    outcome = campaign.run(kind, 0)
    assert outcome.finished
    assert outcome.same_losses
    assert outcome.same_evaluations
    assert outcome.difference == 0
