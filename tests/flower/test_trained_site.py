"""Use of a site's own model, from the site's folder alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedekd.configuration.trained import open_site
from fedekd.federation.run_folder import first_difference

from .conftest import Run, Sites, is_equal

pytestmark = pytest.mark.flower


def site_folder(folder: Path, number: int) -> Path:
    return folder / f"hospital-{number}"


@pytest.fixture
def finished(sites: Sites) -> Sites:
    """Sites after the last round."""
    sites.server().run()
    return sites


def test_open_site_has_the_client_of_the_run_bit_for_bit(finished: Sites, single_process: Run) -> None:
    expected = single_process.client_states()
    for number in range(finished.count):
        trained = open_site("predict", site_folder(finished.folder, number))
        [client] = trained.clients
        assert client.number == number
        assert is_equal(client.state_dict(), expected[number])
        progress = single_process.orchestrator.progress
        assert first_difference(asdict(trained.records[number]), asdict(progress.records[number])) is None
        assert first_difference(trained.local_metrics[number], progress.local_values(number)) is None
        assert trained.provenance.method == "FedeKD"
        assert (trained.provenance.rounds, trained.provenance.clients) == (2, 3)
