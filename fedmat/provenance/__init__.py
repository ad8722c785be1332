"""What other tools can read of the lineage: OpenLineage events, a W3C PROV document, a Workflow Run RO-Crate, all from one graph.

Knows: which files an export consists of. Refuses to know: the network (nothing is sent), whether the lineage is true
(``fedmat.audit``), records. None of the three standards carries a signature or a proof; each record in them names the ledger's entry
that does.

The libraries of the standards are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmat import files
from fedmat.bundle import Bundle
from fedmat.errors import ConfigError
from fedmat.lineage import Graph
from fedmat.provenance.story import Story

if TYPE_CHECKING:
    from prov.model import ProvDocument

    from fedmat.provenance.crate import Audience

Format = Literal["openlineage", "prov", "ro-crate"]
FORMATS: tuple[Format, ...] = ("openlineage", "prov", "ro-crate")
EVENTS, PROV_JSON, PROV_N, CRATE = "openlineage.jsonl", "prov.json", "prov.provn", "ro-crate"


def openlineage(graph: Graph, bundle: Bundle) -> list[dict[str, Any]]:
    """Returns the lineage as OpenLineage run events, as plain JSON in order of time.

    Args:
        bundle: whose ledger the graph was made from; tells the times of the entries.

    Raises:
        ProtocolError: the bundle has no ledger, or one that cannot be read.
    """
    from fedmat.provenance import events

    return events.events(Story.of(graph, bundle))


def prov_document(graph: Graph, bundle: Bundle) -> ProvDocument:
    """Returns the lineage as a W3C PROV document; arguments and errors as :func:`openlineage`."""
    from fedmat.provenance import w3c

    return w3c.document(Story.of(graph, bundle))


def ro_crate(graph: Graph, bundle: Bundle, folder: Path, audience: Audience = "members") -> Path:
    """Writes the lineage of the bundle's run as a Workflow Run RO-Crate into ``folder``, replacing a crate there, and returns it.

    Args:
        audience: to whom it may be shown; decides, by the charter, which files are in it.

    Raises:
        StateError: ``folder`` holds something else than a crate.
        NotEvidenced: the ledger has no plan of the run.
        ProtocolError: as :func:`openlineage`.
    """
    from fedmat.provenance import crate

    return crate.write(Story.of(graph, bundle), bundle, folder, audience)


def write(
    graph: Graph, bundle: Bundle, folder: Path, formats: Iterable[str] = FORMATS, audience: Audience = "members"
) -> dict[str, Path]:
    """Writes the lineage in some formats below ``folder`` and returns format -> file or folder; the same ledger gives the same bytes.

    Raises:
        ConfigError: there is no such format.
        StateError, NotEvidenced, ProtocolError: as :func:`ro_crate`.
    """
    wanted = tuple(dict.fromkeys(formats))
    if unknown := sorted(set(wanted) - set(FORMATS)):
        raise ConfigError(f"no such format: {', '.join(unknown)}", fix=f"choose among {', '.join(FORMATS)}")
    written: dict[str, Path] = {}
    for name in wanted:
        if name == "openlineage":
            written[name] = folder / EVENTS
            lines = (files.canonical_json(event) + b"\n" for event in openlineage(graph, bundle))
            files.write_atomic(written[name], b"".join(lines))
        elif name == "prov":
            from fedmat.provenance import w3c

            document = prov_document(graph, bundle)
            written[name] = folder / PROV_JSON
            files.write_together(folder, {PROV_JSON: w3c.as_json(document), PROV_N: w3c.as_provn(document)})
        else:
            written[name] = ro_crate(graph, bundle, folder / CRATE, audience)
    return written
