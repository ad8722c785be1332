"""Prefect at a site: its data prepared on a schedule, and its rounds where its own people can watch them.

Knows: the party's folder, digests of what is asked. Refuses to know: what a request or an answer holds, other parties. The server
this speaks to is the site's own; the coordinator has another one, and neither sees what the other does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmat import files
from fedmat._version import __version__
from fedmat.errors import FedmatError, StateError
from fedmat.federation.engine import Failure
from fedmat.party import Party
from fedmat.pipeline import Run
from flows.prepare import featurize, ingest, version
from flows.services import _hushed, prefect_home
from flows.shared import alert, call, flow, key, perform, table

READY = "readiness.json"
SCHEMA = "fedmat/readiness/1"
_REQUEST_S = 3.0  # patience with one call to the site's server; the round's deadline runs meanwhile


# --- the data ------------------------------------------------------------------------------------------------------


def party_name() -> str:
    """Names a flow run after the consortium and the party whose folder its parameters name."""
    from prefect import runtime

    home = Path(str(runtime.flow_run.parameters["home"]))
    with suppress(FedmatError):
        party = Party.load(home)
        return f"{party.consortium}/{party.name}"
    return home.name


@flow(
    name="prepare-party",
    flow_run_name=party_name,
    on_failure=[alert],
    on_crashed=[alert],
    description="A site on its own machine validates, versions and featurizes its data, and states that it is ready.",
)
def prepare_party(home: str) -> dict[str, Any]:
    """Prepares the data of the site whose folder this is and returns its certificate, which is also in ``readiness.json``.

    Data that are refused take the certificate away: nobody reads an old one for the state of today.

    Args:
        home: the party's folder.

    Raises:
        StateError: the folder is no site's.
        DataError: the data or the mapping are wrong.
    """
    party = Party.load(Path(home))
    if party.kind != "site":
        raise StateError(f"{home}: {party.name} is no site and has no data", fix="name the folder of a site")
    run, site = party.run(), party.name
    path = party.home / READY
    try:
        snapshot = call(ingest, run, site)
        now = datetime.now(UTC)
        recorded = call(version, run, site, now)
        features = call(featurize, run, site)
        budget = perform("budget", lambda: _budget(run, site), run=run, site=site)
    except FedmatError:
        path.unlink(missing_ok=True)
        raise
    rows = [
        {"what": "accepted", "rows": snapshot.n_records},
        *({"what": f"rejected: {reason}", "rows": count} for reason, count in sorted(snapshot.rejected.items())),
    ]
    table(key(site, "validation"), rows, f"{site}: dataset {snapshot.sha256[:12]}, version {recorded.tag}")
    certificate = {
        "schema": SCHEMA,
        "party": site,
        "consortium": party.consortium,
        "date": now.isoformat(timespec="seconds"),
        "dataset_sha256": snapshot.sha256,
        "contract_version": files.read_json(run.site_folder(site) / "manifest.json")["contract_version"],
        "n_records": snapshot.n_records,
        "n_rejected": snapshot.n_rejected,
        "features_sha256": features.sha256,
        "n_features": features.n_features,
        "version": recorded.tag,
        "fedmat": __version__,
        "privacy": budget,
    }
    files.write_json(path, certificate)
    return certificate


def _budget(run: Run, site: str) -> dict[str, float] | None:
    """Returns what is left of a site's privacy budget; None where the plan takes none."""
    from fedmat.federation.site import LEDGER
    from fedmat.privacy.accounting import BudgetLedger

    privacy = run.plan().settings.privacy
    if privacy.unit == "none":
        return None
    path = run.site_folder(site) / LEDGER
    if not path.exists():
        return {"epsilon": privacy.epsilon, "delta": privacy.delta, "left": privacy.epsilon}
    ledger = BudgetLedger(path)
    epsilon, delta = ledger.budget
    return {"epsilon": epsilon, "delta": delta, "left": ledger.remaining()}


# --- a round -------------------------------------------------------------------------------------------------------

_WORK: ContextVar[Callable[[], bytes | Failure]] = ContextVar("_WORK")


@flow(name="site-round", flow_run_name="{kind} {request_sha256}", description="This site's part of one round.")
def site_round(consortium_sha256: str, kind: str, request_sha256: str) -> Any:
    """Does the work that :func:`watched` brought; parameters are references, and the answer goes past Prefect.

    Args:
        consortium_sha256: of the consortium file the coordinator runs.
        kind: of the request.
        request_sha256: of the request's bytes.
    """
    del consortium_sha256, kind, request_sha256
    reply = _WORK.get()()
    if isinstance(reply, bytes):
        return None
    from prefect.states import Failed

    return Failed(message=f"no answer: {type(reply).__name__.lower()}, {reply.reason}")


def watched(url: str, party: Party, given: dict[str, str], work: Callable[[], bytes | Failure]) -> tuple[bytes | Failure, bool]:
    """Does a round's work in a flow of the site's own server; returns the answer, and whether the server did its part.

    The work is done once: before Prefect failed, after it failed, but never twice.

    Args:
        url: of the server, without ``/api``.
        given: parameters of :func:`site_round`.

    Raises:
        FedmatError: as the work raised it; a foreign exception as :func:`flows.shared.perform` says.
    """
    found: list[bytes | Failure | FedmatError] = []

    def once() -> bytes | Failure:
        try:
            found.append(perform("round", work, run=party.run(), site=party.name))
        except FedmatError as error:
            found.append(error)
        last = found[-1]
        if isinstance(last, FedmatError):
            raise last
        return last

    token = _WORK.set(once)
    served = True
    try:
        with _impatient(url, party.home), _hushed():
            site_round(**given, return_state=True)
    except Exception:  # whatever Prefect's client raises, the round is worth more than its page  # noqa: BLE001
        served = False
    finally:
        _WORK.reset(token)
    reply = found[0] if found else work()
    if isinstance(reply, FedmatError):
        raise reply
    return reply, served


def warm(url: str, home: Path) -> None:
    """Does once, beside the work, what takes a second when the first flow of a process meets a server."""
    import fastapi  # Prefect imports it when the first parameters go out
    from prefect.client.orchestration import get_client

    del fastapi
    with _impatient(url, home), get_client(sync_client=True) as client:
        client.api_version()


@contextmanager
def _impatient(url: str, home: Path) -> Iterator[None]:
    """Prefect's settings for a round, which does not wait for its page."""
    from prefect.settings import temporary_settings

    values: dict[str, object] = {
        "home": prefect_home(home),
        "api.url": f"{url}/api",
        "api.request_timeout": _REQUEST_S,
        "client.max_retries": 0,
        "logging.to_api.enabled": False,  # there is nothing to read, and a server that went away would be complained about
        "flows.heartbeat_frequency": None,  # its thread sleeps for a whole second
    }
    with temporary_settings(values):  # type: ignore[arg-type]
        yield
