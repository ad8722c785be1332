"""Record-level privacy in the rounds: noise that the budget pays for, and a stop where it is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import consortium
import numpy as np
import pytest

from fedmat import wire
from fedmat.domain import TrainRequest, Update
from fedmat.errors import RoundFailed
from fedmat.federation.engine import Handler
from fedmat.federation.site import LEDGER
from fedmat.privacy.accounting import BudgetLedger, Event, epsilon

PRIVATE = {"unit": "record", "epsilon": 8.0, "delta": 1e-5}


def settings(**plan: Any) -> Any:
    base = {"privacy": PRIVATE, "rounds": 2, "quorum": 5, "local": {"steps": 4, "batch_size": 8, "lr": 3e-3}}
    return consortium.config(consortium.SEVEN, **{**base, **plan})


def test_every_round_is_paid_for_before_it_is_trained_and_the_whole_run_fits_the_budget(tmp_path: Path) -> None:
    plan = settings(security={"mode": "trigram", "clip": 5.0})
    reports, model = consortium.run(plan, tmp_path)
    assert model is not None and all(len(r.shares) == 7 for r in reports)
    for site in consortium.SEVEN:
        ledger = BudgetLedger(tmp_path / "sites" / site / LEDGER)
        entries = ledger.entries()
        assert [e.round for e in entries] == [0, 1] and all(e.event.steps == 4 for e in entries)
        spent = epsilon([Event(e.event.noise_multiplier, e.event.sampling_rate, 4) for e in entries], 1e-5)
        assert ledger.spent() == pytest.approx(spent) and 7.0 < spent <= 8.0


def test_a_spent_budget_stops_the_site_and_with_too_few_left_the_run(tmp_path: Path) -> None:
    plan = settings(privacy={**PRIVATE, "noise_multiplier": 0.5, "epsilon": 12.0}, rounds=30)
    with pytest.raises(RoundFailed, match="budget"):
        consortium.run(plan, tmp_path)
    for site in consortium.SEVEN:
        assert BudgetLedger(tmp_path / "sites" / site / LEDGER).spent() <= 12.0


def test_no_number_about_records_travels_beside_a_private_update_and_a_repeated_question_gets_the_same_noise(
    tmp_path: Path,
) -> None:
    seen: list[tuple[bytes, Update]] = []

    def watching(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            reply = handle(data)
            if isinstance(wire.decode(data, object), TrainRequest):
                assert handle(data) == reply
                seen.append((data, wire.decode(reply, Update)))
            return reply

        return answer

    consortium.run(settings(), tmp_path, {"ash": watching})
    assert len(seen) == 2
    for _, update in seen:
        assert np.isnan(update.train_loss) and not len(update.validation)
    assert len(BudgetLedger(tmp_path / "sites" / "ash" / LEDGER).entries()) == 2
