"""Encrypted rounds through the real coordinator, workers and roles: what comes out, what gets through, what goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consortium
import numpy as np
import pytest

from fedmat import weights as wts
from fedmat import wire
from fedmat.contribution import gram_shapley
from fedmat.domain import (
    Answered,
    AttestRequest,
    Checkpoint,
    EvaluateRequest,
    GlobalModel,
    Prepared,
    Sealed,
    TrainRequest,
    Update,
)
from fedmat.envelopes import (
    ROLES,
    ArrivedRequest,
    AuditRequest,
    AuditVote,
    CommitRequest,
    ConfirmRequest,
    DepositRequest,
    HeaderRequest,
    MaskKeysRequest,
    MaskSharesRequest,
    Opening,
    OpenRequest,
    ShareRequest,
    UnmaskRequest,
)
from fedmat.errors import FedmatError, PlanRefused, RoundFailed
from fedmat.federation.engine import Handler
from fedmat.federation.plan import Plan

TRIGRAM = {"mode": "trigram", "clip": 5.0}
MULTI_KRUM = {"name": "multi_krum", "hostile": 1}
SKETCH = {"name": "hadamard", "share": 0.5}
ROLE_STEPS = (HeaderRequest, DepositRequest, CommitRequest, ShareRequest, OpenRequest, ConfirmRequest)


def settings(**plan: Any) -> Any:
    return consortium.config(consortium.SEVEN, **{"security": TRIGRAM, "quorum": 5, "rounds": 3, **plan})


def digest(model: Any) -> str:
    return wire.weights_digest(model.weights, model.scaler)


def failing(kind: type, times: int = 10**9, error: type[Exception] = OSError) -> Callable[[Handler], Handler]:
    """A party that breaks down at a message of one kind, so many times."""

    def wrap(handle: Handler) -> Handler:
        left = [times]

        def answer(data: bytes) -> bytes:
            if isinstance(wire.decode(data, object), kind) and left[0] > 0:
                left[0] -= 1
                raise error("broke down")
            return handle(data)

        return answer

    return wrap


# --- the same model --------------------------------------------------------------------------------------------------


def test_the_encrypted_mean_is_the_clear_mean_up_to_rounding(tmp_path: Path) -> None:
    clear = consortium.run(settings(security={"mode": "none"}), tmp_path / "clear")[1]
    sealed = consortium.run(settings(), tmp_path / "sealed")[1]
    assert clear is not None and sealed is not None
    for name, tensor in clear.weights.items():
        np.testing.assert_allclose(sealed.weights[name], tensor, atol=5e-3)


@pytest.mark.parametrize(
    "more", [{}, {"rule": MULTI_KRUM, "compression": SKETCH}, {"security": {"mode": "masking", "clip": 5.0}}]
)
def test_same_plan_and_data_give_the_same_bytes_with_other_keys_and_pads(tmp_path: Path, more: dict[str, Any]) -> None:
    models = [consortium.run(settings(**more), tmp_path / str(i))[1] for i in range(2)]
    assert digest(models[0]) == digest(models[1])


@pytest.mark.parametrize("more", [{"rule": MULTI_KRUM, "compression": SKETCH}, {"security": {"mode": "masking", "clip": 5.0}}])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, more: dict[str, Any]) -> None:
    plan = settings(**more)
    whole = consortium.run(plan, tmp_path / "whole")[1]
    consortium.run(plan, tmp_path / "cut", stop=1)
    resumed = consortium.run(plan, tmp_path / "cut")[1]
    assert digest(whole) == digest(resumed)


@pytest.mark.parametrize("kind", [*ROLE_STEPS, TrainRequest, AuditRequest])
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_coordinator_that_crashes_at_any_message_goes_on_bit_identically(tmp_path: Path, kind: type, after: bool) -> None:
    plan = settings(rule=MULTI_KRUM, compression=SKETCH)
    whole = consortium.run(plan, tmp_path / "whole")[1]
    party = "fir" if kind in (TrainRequest, AuditRequest) else "auditor"

    class Crash(BaseException):
        pass

    def crashing(handle: Handler) -> Handler:
        seen = [0]

        def answer(data: bytes) -> bytes:
            if isinstance(wire.decode(data, object), kind):
                seen[0] += 1
                if seen[0] == 2:  # in the second round
                    if after:
                        handle(data)
                    raise Crash
            return handle(data)

        return answer

    with pytest.raises(Crash):
        consortium.run(plan, tmp_path / "cut", {party: crashing})
    resumed = consortium.run(plan, tmp_path / "cut")[1]
    assert digest(whole) == digest(resumed)


# --- what gets through ------------------------------------------------------------------------------------------------


def test_no_update_crosses_the_wire_in_the_clear(tmp_path: Path) -> None:
    seen: list[Any] = []

    def watching(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            reply = handle(data)
            seen.append(wire.decode(reply, object))
            return reply

        return answer

    consortium.run(settings(), tmp_path, dict.fromkeys(consortium.SEVEN, watching))
    sealed = [m for m in seen if isinstance(m, Sealed)]
    assert len(sealed) == 21 and not any(isinstance(m, Update) for m in seen)
    assert all(np.isnan(m.train_loss) and not len(m.validation) for m in sealed)
    counts = np.bincount(np.concatenate([m.content.masked for m in sealed]), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)


def test_a_site_does_not_send_in_the_clear_what_its_plan_encrypts(tmp_path: Path) -> None:
    plan = settings()
    worker = consortium.worker("ash", plan, tmp_path)
    request = TrainRequest(Plan.of(plan).sha256, 0, 0.1, "x")
    with pytest.raises(PlanRefused, match="security trigram"):
        worker.handle(wire.encode(request))


def test_every_member_audits_its_own_row_and_a_report_holds_no_norms(tmp_path: Path) -> None:
    reports, _ = consortium.run(settings(rule=MULTI_KRUM), tmp_path)
    for r in reports:
        assert r.audits == dict.fromkeys(consortium.SEVEN, "agrees")
        assert r.update_norms == {} and r.protection == "trigram" and set(r.evidence) == {"header", "gram", "sum"}
        assert set(r.excluded) == set(consortium.SEVEN) - set(r.shares) and len(r.shares) == 6
        assert set(r.role_bytes) == {"aggregator", "auditor", "notary"}


def test_a_hostile_update_is_left_out_with_a_reason_its_owner_can_read(tmp_path: Path) -> None:
    from fedmat.hostile import run, vary

    plan = vary(Plan.of(settings(rule=MULTI_KRUM)), rounds=2)
    tables = {s: consortium.table(s) for s in consortium.SEVEN}
    found = run(plan, tables, tmp_path, attack="scaling", hostile=("gorse",))
    assert found.hostile_share == 0.0
    assert all("gorse" in r.excluded for r in found.reports)


def test_an_update_that_wraps_around_the_ring_never_counts(tmp_path: Path) -> None:
    from fedmat.hostile import run

    tables = {s: consortium.table(s) for s in consortium.SEVEN}
    found = run(Plan.of(settings(rounds=2)), tables, tmp_path, attack="modular_wrap", hostile=("gorse",))
    for report in found.reports:
        assert "malformed" in report.excluded["gorse"] and "gorse" not in report.shares


def test_a_round_whose_opening_was_tampered_with_is_given_up_and_its_updates_are_never_sent_again(tmp_path: Path) -> None:
    sent: list[tuple[int, str]] = []

    def tampering(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            reply = handle(data)
            message = wire.decode(reply, object)
            if isinstance(message, Opening) and wire.decode(data, OpenRequest).header.round == 0:
                part = np.array(message.part)
                part[0] ^= 1
                return wire.encode(dataclasses.replace(message, part=part))
            return reply

        return answer

    def counting(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            message = wire.decode(data, object)
            if isinstance(message, TrainRequest):
                sent.append((message.round, message.model_sha256))
            return handle(data)

        return answer

    reports, model = consortium.run(settings(), tmp_path, {"auditor": tampering, "ash": counting})
    assert reports[0].shares == {} and "given up" in reports[0].dropouts[0].detail
    assert [number for number, _ in sent] == [0, 1, 2] and sent[0][1] == sent[1][1]
    assert len(reports[1].shares) == 7 and model is not None


# --- who is missing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AttestRequest, TrainRequest, AuditRequest])
def test_two_of_seven_sites_may_be_lost_at_any_step(tmp_path: Path, kind: type) -> None:
    bad = {"ash": failing(kind), "elm": failing(kind)}
    reports, model = consortium.run(settings(), tmp_path, bad)
    assert model is not None
    if kind is TrainRequest:
        assert all({d.site for d in r.dropouts} == {"ash", "elm"} and len(r.shares) == 5 for r in reports)
    if kind is AuditRequest:
        assert all(r.audits["ash"] == "silent" and len(r.shares) == 7 for r in reports)


@pytest.mark.parametrize("kind", [MaskKeysRequest, MaskSharesRequest, TrainRequest, ArrivedRequest, UnmaskRequest])
def test_masked_rounds_survive_two_lost_sites_at_any_step(tmp_path: Path, kind: type) -> None:
    plan = settings(security={"mode": "masking", "clip": 5.0})
    bad = {"ash": failing(kind), "elm": failing(kind)}
    reports, _ = consortium.run(plan, tmp_path, bad)
    assert len(reports) == 3 and all(len(r.shares) >= 5 for r in reports)


def test_a_round_whose_tries_are_spent_opens_nothing_and_is_tried_afresh_by_the_next_run(tmp_path: Path) -> None:
    plan = settings(rule=MULTI_KRUM, rounds=2)

    def garbling(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            reply = handle(data)
            message = wire.decode(reply, object)
            if isinstance(message, Sealed):
                masked = np.array(message.content.masked)
                masked[0] ^= 1
                return wire.encode(dataclasses.replace(message, content=dataclasses.replace(message.content, masked=masked)))
            return reply

        return answer

    opened: list[int] = []

    def watching(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            message = wire.decode(data, object)
            if isinstance(message, OpenRequest):
                opened.append(message.header.exchange)
            return handle(data)

        return answer

    bad = dict.fromkeys(("ash", "birch", "cedar"), garbling)
    with pytest.raises(RoundFailed, match="too_few"):
        consortium.run(plan, tmp_path, {**bad, "notary": watching})
    assert not opened
    reports, model = consortium.run(plan, tmp_path, {"notary": watching})
    assert [r.exchange for r in reports] == opened == [3, 4]
    assert digest(model) == digest(consortium.run(plan, tmp_path / "whole")[1])


def test_too_few_sites_end_the_run_and_open_nothing(tmp_path: Path) -> None:
    bad = dict.fromkeys(("ash", "birch", "cedar"), failing(TrainRequest))
    with pytest.raises(RoundFailed, match="quorum is 5"):
        consortium.run(settings(), tmp_path, bad)
    assert consortium.run(settings(), tmp_path)[1] is not None


@pytest.mark.parametrize("kind", ROLE_STEPS)
@pytest.mark.parametrize(
    "role", ["aggregator", pytest.param("auditor", marks=pytest.mark.slow), pytest.param("notary", marks=pytest.mark.slow)]
)
def test_a_role_that_stays_away_stops_the_run_which_goes_on_when_it_is_back(tmp_path: Path, role: str, kind: type) -> None:
    plan = settings(rule=MULTI_KRUM, rounds=2)
    with pytest.raises(RoundFailed, match=role):
        consortium.run(plan, tmp_path, {role: failing(kind)})
    assert digest(consortium.run(plan, tmp_path)[1]) == digest(consortium.run(plan, tmp_path / "whole")[1])


@pytest.mark.parametrize("kind", ROLE_STEPS)
def test_a_role_that_crashes_and_comes_back_changes_nothing(tmp_path: Path, kind: type) -> None:
    plan = settings(rule=MULTI_KRUM)
    whole = consortium.run(plan, tmp_path / "whole")[1]
    folder = tmp_path / "again"

    def restarting(handle: Handler) -> Handler:
        current = [handle]

        def answer(data: bytes) -> bytes:
            if isinstance(wire.decode(data, object), kind):
                current[0](data)  # answered, written down, and lost on the way
                current[0] = consortium.role("notary", plan, folder)  # starts again from its folder
            return current[0](data)

        return answer

    again = consortium.run(plan, folder, {"notary": restarting})[1]
    assert digest(whole) == digest(again)


@pytest.mark.slow
def test_canary_rounds_test_the_roles_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    plan = settings(security={**TRIGRAM, "canary_rate": 0.5, "exchanges": 12}, rounds=6)
    reports, with_canaries = consortium.run(plan, tmp_path / "canary")
    assert any("canary" in finding for r in reports for finding in r.audits.values()) or max(r.exchange for r in reports) > 5
    plain = consortium.run(settings(rounds=6), tmp_path / "plain")[1]
    assert with_canaries is not None and plain is not None
    for name, tensor in plain.weights.items():
        np.testing.assert_array_equal(with_canaries.weights[name], tensor)


def test_a_site_tells_of_a_canary_only_after_the_roles_have_signed_what_they_opened(tmp_path: Path) -> None:
    plan = settings(security={**TRIGRAM, "canary_rate": 0.5}, rounds=6)
    asked: list[AuditVote] = []

    def impatient(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            request = wire.decode(data, object)
            if isinstance(request, AuditRequest):
                bad = tuple(dataclasses.replace(c, signature=np.zeros(64, np.uint8)) for c in request.confirmations)
                forged = wire.decode(handle(wire.encode(dataclasses.replace(request, confirmations=bad))), AuditVote)
                true = wire.decode(handle(data), AuditVote)
                if len(true.canary):
                    asked.append(forged)
            return handle(data)

        return answer

    consortium.run(plan, tmp_path, {"ash": impatient})
    assert asked and all(not len(v.canary) and not v.agrees for v in asked)


# --- what a plan permits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"security": {"mode": "masking"}, "rule": MULTI_KRUM}, "only the sum is opened"),
        ({"security": {"mode": "ckks"}, "rule": MULTI_KRUM}, "only the sum is opened"),
        ({"rule": {"name": "trimmed_mean", "hostile": 1}}, "every coordinate"),
        ({"rule": {"name": "multi_krum", "hostile": 2}, "quorum": 6}, "2 ?f|hostile"),
        ({"rule": {"name": "mean", "hostile": 1}}, "hostile"),
        ({"algorithm": "scaffold", "local": {"optimizer": "sgd"}}, "second vector"),
        ({"quorum": 3}, "is not opened"),
        ({"privacy": {"unit": "site"}}, "noise"),
        ({"privacy": {"unit": "record"}, "ensemble": 2}, "ensemble"),
        ({"contribution": {"method": "gram"}}, "64-bit"),
        ({"compression": SKETCH, "server": {"name": "adam"}}, "downlink"),
    ],
)
def test_a_plan_refuses_what_does_not_go_together_and_names_the_way_out(plan: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanRefused, match=why) as error:
        Plan.of(settings(**plan))
    assert error.value.fix


def test_four_sites_are_too_few_to_hide_in_a_sum() -> None:
    with pytest.raises(PlanRefused, match="read each other"):
        Plan.of(consortium.config(security=TRIGRAM, quorum=4))


def test_only_the_parties_asked_can_answer(tmp_path: Path) -> None:
    """A role answers no training question, a site no role's."""
    plan = settings()
    site, auditor = consortium.worker("ash", plan, tmp_path), consortium.role("auditor", plan, tmp_path)
    header = HeaderRequest(Plan.of(plan).sha256, None)  # type: ignore[arg-type]
    with pytest.raises(FedmatError):
        site.handle(wire.encode(header))
    with pytest.raises(FedmatError):
        auditor(wire.encode(AttestRequest(Plan.of(plan).sha256)))
    with pytest.raises(FedmatError):
        auditor(b"nonsense")
    assert AuditVote and EvaluateRequest


def test_ckks_rounds_give_the_mean_and_survive_a_lost_site(tmp_path: Path) -> None:
    plan = settings(security={"mode": "ckks", "clip": 5.0}, rounds=2)
    clear = consortium.run(settings(security={"mode": "none"}, rounds=2), tmp_path / "clear")[1]
    reports, sealed = consortium.run(plan, tmp_path / "sealed")
    assert clear is not None and sealed is not None
    for name, tensor in clear.weights.items():
        np.testing.assert_allclose(sealed.weights[name], tensor, atol=5e-3)
    assert all(r.protection == "ckks" and "auditor" in r.role_bytes for r in reports)
    lost, _ = consortium.run(plan, tmp_path / "lost", {"ash": failing(TrainRequest)})
    assert all("ash" not in r.shares and len(r.shares) == 6 for r in lost)


def test_contributions_are_read_from_what_the_roles_open_and_a_free_rider_gets_none(tmp_path: Path) -> None:
    from fedmat.federation.reference import ReferenceWorker
    from fedmat.hostile import run

    plan = Plan.of(
        settings(
            security={"mode": "trigram", "ring_bits": 64, "clip": 5.0}, contribution={"method": "gram", "rows": 30}, rounds=4
        )
    )
    rows = consortium.table("reference", seed=4)

    def setup(handlers: dict[str, Handler]) -> None:
        handlers["reference"] = ReferenceWorker(plan, rows).handle

    tables = {s: consortium.table(s) for s in consortium.SEVEN}
    found = run(plan, tables, tmp_path, attack="free_ride", hostile=("gorse",), setup=setup)
    total = {s: sum(r.contribution[s] for r in found.reports) for s in consortium.SEVEN}
    assert total["gorse"] < 0 < sum(total.values()) / 7  # it dilutes the others, and what it sends helps nobody


def test_contributions_equal_those_of_the_plain_updates(tmp_path: Path) -> None:
    """The shares the roles open are those anyone would compute who saw every update."""
    plan = settings(
        security={"mode": "trigram", "ring_bits": 64, "clip": 5.0}, contribution={"method": "gram", "rows": 20}, rounds=1
    )
    answers: dict[str, Any] = {}

    def keeping(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            reply = handle(data)
            answers["map"] = wire.decode(reply, object)
            return reply

        return answer

    (report,), _ = consortium.run(plan, tmp_path, {"reference": keeping})
    public = answers["map"]
    matrix = np.frombuffer(public.matrix.tobytes(), "<i4").reshape(public.rows, -1) * public.scale
    residual = np.frombuffer(public.targets.tobytes(), "<i4") * public.target_scale
    numbers = {}
    for s in consortium.SEVEN:
        (path,) = (tmp_path / "sites" / s).glob("state/*/sealed/*/prepared-*.safetensors")
        numbers[s] = wire.decode(path.read_bytes(), Prepared).numbers
    mapped = np.stack([matrix @ numbers[s] for s in consortium.SEVEN])
    expected = gram_shapley(mapped @ mapped.T, mapped @ residual, [1] * 7, rows=public.rows)
    np.testing.assert_allclose([report.contribution[s] for s in consortium.SEVEN], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["trigram", "masking"])
def test_no_update_and_no_key_is_anywhere_outside_its_party(tmp_path: Path, mode: str) -> None:
    """Every message, the coordinator's folder and the roles' folders, searched for updates (as numbers and words) and keys."""
    messages: dict[str, bytes] = {}

    def watching(party: str) -> Callable[[Handler], Handler]:
        def wrap(handle: Handler) -> Handler:
            def answer(data: bytes) -> bytes:
                reply = handle(data)
                messages[f"{party} {len(messages)}"] = data + reply
                return reply

            return answer

        return wrap

    plan = settings(security={"mode": mode, "clip": 5.0}, rounds=2)
    parties = (*consortium.SEVEN, *(ROLES if mode == "trigram" else ()))
    consortium.run(plan, tmp_path, {p: watching(p) for p in parties})
    updates: dict[str, bytes] = {}
    for site in consortium.SEVEN:
        for path in (tmp_path / "sites" / site).glob("state/*/sealed/*/*.safetensors"):
            kept = wire.decode(path.read_bytes(), Prepared | Answered)
            raw = kept.numbers.tobytes() if isinstance(kept, Prepared) else kept.words.tobytes()
            updates |= {f"{site} {path.stem} {at}": raw[at : at + 24] for at in (0, 40, len(raw) - 24)}
    keys = {
        f"{p} {f}": consortium.key_folder(tmp_path, p) / f
        for p in (*consortium.SEVEN, *ROLES)
        for f in ("signing.key", "sealing.key")
    }
    secrets = {name: bytes.fromhex(path.read_text().split()[1]) for name, path in keys.items()}
    outside = messages | {
        str(p): p.read_bytes()
        for part in ("run", "roles")
        for p in (tmp_path / part).rglob("*")
        if p.is_file() and "keys" not in p.parts
    }
    assert len(updates) == 7 * 2 * 2 * 3 and len(secrets) == 20 and len(outside) > 50
    for name, needle in (updates | secrets).items():
        for place, data in outside.items():
            assert needle not in data and needle.hex().encode() not in data, f"{name} is in {place}"
    inside = b"".join(p.read_bytes() for p in (tmp_path / "sites").rglob("*") if p.is_file())
    assert all(needle in inside for needle in updates.values())  # the search finds what is there


@pytest.mark.parametrize("mode", ["none", "trigram"])
def test_sites_and_coordinator_make_a_longer_step_alike_bit_for_bit(tmp_path: Path, mode: str) -> None:
    """3 (s x) and (3 s) x differ in their last bits: one such model in a hundred rounds would have to be sent whole."""
    plan = settings(security={"mode": mode, "clip": 5.0}, compression=SKETCH, server={"lr": 3.0}, rounds=2)
    held: list[np.ndarray[Any, Any]] = []
    reports, _ = consortium.run(plan, tmp_path)
    for path in (tmp_path / "sites").glob("*/state/*/held.safetensors"):
        held.append(wts.flatten(wire.decode(path.read_bytes(), GlobalModel).weights))
    last = wire.decode((tmp_path / "run" / "checkpoint.safetensors").read_bytes(), Checkpoint)
    if mode == "trigram":  # the audit brought the last step
        assert len(held) == 7 and all((h == wts.flatten(last.weights)).all() for h in held)
    assert all(b < 8 * last.weights["hidden.0.weight"].nbytes + 20_000 for r in reports[1:] for b in r.bytes_down.values())


@pytest.mark.parametrize("mode", ["none", "trigram"])
def test_a_site_that_lost_its_model_is_sent_it_whole_and_nothing_else_changes(tmp_path: Path, mode: str) -> None:
    plan = settings(security={"mode": mode, "clip": 5.0}, compression=SKETCH)
    whole_reports, whole = consortium.run(plan, tmp_path / "whole")
    consortium.run(plan, tmp_path / "lost", stop=1)
    for path in (tmp_path / "lost" / "sites" / "ash").glob("state/*/held.safetensors"):
        path.unlink()
    reports, model = consortium.run(plan, tmp_path / "lost")
    assert digest(whole) == digest(model)
    second, usual = reports[0], whole_reports[1]
    assert second.bytes_down["ash"] > usual.bytes_down["ash"]
    assert {s: b for s, b in second.bytes_down.items() if s != "ash"} == {
        s: b for s, b in usual.bytes_down.items() if s != "ash"
    }


def test_an_audit_that_no_role_confirmed_moves_nothing_at_the_site(tmp_path: Path) -> None:
    plan = settings(rule=MULTI_KRUM, compression=SKETCH)

    def forging(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            request = wire.decode(data, object)
            if isinstance(request, AuditRequest):
                bad = tuple(dataclasses.replace(c, signature=np.zeros(64, np.uint8)) for c in request.confirmations)
                forged = dataclasses.replace(request, confirmations=bad, total=np.array(request.total)[::-1].copy())
                assert not wire.decode(handle(wire.encode(forged)), AuditVote).agrees
            return handle(data)

        return answer

    honest, whole = consortium.run(plan, tmp_path / "whole")
    forged, model = consortium.run(plan, tmp_path / "forged", {"ash": forging})
    assert digest(whole) == digest(model)
    assert [r.bytes_down for r in honest] == [r.bytes_down for r in forged]  # no site had to be sent its model again
