"""Asks the standard's own validator about a crate; `make check-crate` calls it twice, since the validator needs an environment of its own.

``python tests/check_crate.py make FOLDER`` writes the crate of a synthetic run with this project's environment.
``python tests/check_crate.py validate FOLDER`` validates a crate with the validator's environment: all that is required, and all that
is recommended but for what a consortium cannot have (docs/provenance.md). It needs no network: the JSON-LD context of RO-Crate 1.1
comes from an old release of rocrate, which had it in its wheel.
"""

from __future__ import annotations

import email.message
import importlib.util
import io
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

CONTEXT = "https://w3id.org/ro/crate/1.1/context"
NOT_OURS = (
    "process-run-crate-0.5_3.2",  # an application SHOULD have a url
    "process-run-crate-0.5_5.1",  # and an absolute URI of http as its id
    "ro-crate-1.1_31.2",  # an organisation SHOULD have a URL
)


def make(folder: Path) -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import ledger_scene

    from fedmat import provenance
    from fedmat.bundle import Bundle
    from fedmat.ledger.fold import Fold
    from fedmat.lineage import Graph

    with tempfile.TemporaryDirectory() as home:
        scene = ledger_scene.build(Path(home), sites=3, rounds=5, exclusions=True)
        bundle = Bundle.open(scene.bundle)
        graph = Graph.of(Fold.of(bundle.ledger().entries), bundle)
        provenance.ro_crate(graph, bundle, folder)


def validate(folder: Path) -> int:
    spec = importlib.util.find_spec("rocrate")
    assert spec is not None and spec.submodule_search_locations
    context = (Path(spec.submodule_search_locations[0]) / "data/ro-crate.jsonld").read_bytes()

    class Answer(io.BytesIO):
        status = code = 200
        url = CONTEXT
        headers = email.message.Message()

        def info(self) -> email.message.Message:
            return self.headers

        def geturl(self) -> str:
            return self.url

    Answer.headers["Content-Type"] = "application/ld+json"

    def opened(request: Any, *_: Any, **__: Any) -> Answer:
        url = request if isinstance(request, str) else request.full_url
        if url != CONTEXT:
            raise OSError(f"{url} is asked for, and this check has no network")
        return Answer(context)

    urllib.request.urlopen = opened
    import rdflib._networking
    import requests

    def sent(_: Any, request: Any, **__: Any) -> requests.Response:
        answer = requests.Response()
        known = request.url == CONTEXT
        answer.status_code, answer.url, answer.request = (200 if known else 404), request.url, request
        answer._content, answer.headers["Content-Type"] = (context if known else b""), "application/ld+json"
        return answer

    rdflib._networking.urlopen = opened
    requests.Session.send = sent  # type: ignore[method-assign, assignment]
    from rocrate_validator import services
    from rocrate_validator.models import ValidationSettings

    failed = 0
    for severity, skipped in (("REQUIRED", ()), ("RECOMMENDED", NOT_OURS)):
        settings = ValidationSettings(
            rocrate_uri=str(folder), profile_identifier="provenance-run-crate", requirement_severity=severity, no_cache=True,
            skip_checks=list(skipped),
        )  # fmt: skip
        result = services.validate(settings)
        counts = result.statistics.to_dict()
        print(f"{severity}: {counts['total_passed_checks']} of {counts['total_checks']} checks passed, "
              f"{len(skipped)} not asked")  # fmt: skip
        for issue in result.get_issues():
            failed += 1
            print(f"  {issue.check.identifier}: {issue.message} ({issue.violatingEntity})")
    return 1 if failed else 0


if __name__ == "__main__":
    what, where = sys.argv[1:]
    if what == "make":
        make(Path(where))
    else:
        sys.exit(validate(Path(where)))
