"""The commands of a file drop: ``fedmat site export-request | run-request | import-update``.

Knows: what the operator and a site's person type, the two folders, the date. Refuses to know: what a file holds and when it counts
(``fedmat.federation.drop``), how a site answers (``fedmat.party``). Every command ends by saying what to do next, with which file.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmat.cli_data import site_app
from fedmat.commands import Json
from fedmat.errors import ConfigError, StateError

if TYPE_CHECKING:
    from fedmat.federation.engine import Failure

DROP = "drop"  # in the operator's project folder
Project = Annotated[Path, typer.Option(help="The operator's project folder.")]
To = Annotated[Path | None, typer.Option(help="Folder to write to, e.g. the stick that is carried.")]


@site_app.command("export-request")
def site_export_request(
    site: Annotated[str, typer.Argument(help="The site's name in the consortium file.")],
    project: Project,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Write the request that a site without a connection is to be brought.

    At the operator. The coordinator waits meanwhile; the request stays until it is answered, so it can be written again. A file is
    signed, not encrypted.

    Example:  fedmat site export-request mill --project project --to /media/stick
    """
    from fedmat import console
    from fedmat.federation import drop

    _carried_to(project, site)
    paths = drop.export_requests(project / DROP, to or Path(), site)
    then = [f"carry {console.show_path(p)} to {site}; there: fedmat site run-request {p.name} --home FOLDER" for p in paths]
    _tell(
        as_json,
        {"site": site, "files": [str(p) for p in paths]},
        f"{site}: {len(paths)} request{'s' * (len(paths) != 1)} to carry" if paths else f"{site}: no request waits for it",
        "; ".join(then) if then else "wait until the coordinator asks for something, then run this again",
    )


@site_app.command("run-request")
def site_run_request(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .request file that was brought.")],
    home: Annotated[Path, typer.Option(help="The site's own folder, made by fedmat site join.")],
    to: To = None,
    as_json: Json = False,
) -> None:
    """Answer a request that was brought, and write the answer for the way back.

    At the site. The request must be signed by the consortium's server and be for this site; the site's policy decides as it does
    with a connection. The same request gives the same answer, however often it is run.

    Example:  fedmat site run-request mill-3-8f2c61d0a9be.request --home mill
    """
    from fedmat import console
    from fedmat.federation import drop
    from fedmat.party import Desk

    desks: list[Desk] = []

    def answer(*asked: Any) -> bytes | Failure:
        desks.append(Desk(home))  # only for a request that counts, and that was not answered before
        return desks[0].answer(*asked)

    try:
        with console.working("answering"):
            path = drop.run_request(file, home, answer, now=_now(), to=to)
    finally:
        for desk in desks:
            desk.close()
    made = drop.read(path)
    failure, where = _failure(made.reply), console.show_path(path)
    carry = f"carry {where} to the operator; there: fedmat site import-update {path.name} --project FOLDER"
    _tell(
        as_json,
        {"site": made.header.party, "file": str(path), "failure": failure},
        f"{made.header.party}: answered" if failure is None else f"{made.header.party} gives no answer: {_why(failure)}",
        carry if failure is None else f"mend that and run the same file again, or {carry}",
    )


@site_app.command("import-update")
def site_import_update(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .answer file that was brought back.")],
    project: Project,
    as_json: Json = False,
) -> None:
    """Take in the answer that was brought back from a site.

    At the operator. It must be signed by that site and answer the very request that waits; anything else is refused and changes
    nothing. A coordinator that waits goes on by itself.

    Example:  fedmat site import-update mill-3-8f2c61d0a9be.answer --project project
    """
    from fedmat.federation import drop

    taken = drop.import_answer(file, project / DROP, _bytes(project / "ca" / "ca.crt"), _revoked(project), _now())
    failure = None if taken.failure is None else _failure(taken.failure)
    if failure is not None:
        said, then = (
            f"{taken.party} gave no answer: {_why(failure)}",
            f"{taken.party} can mend that and run the same request again",
        )
    elif taken.again:
        said, then = f"{taken.party}: this answer had been imported before", "nothing: the coordinator has it"
    else:
        said, then = (
            f"{taken.party}: imported {file.name}",
            "nothing: the coordinator goes on; if it was stopped, start it again",
        )
    _tell(as_json, {"site": taken.party, "file": str(taken.path), "again": taken.again, "failure": failure}, said, then)


def _carried_to(project: Path, site: str) -> None:
    """Refuses a site that files are not carried to."""
    from fedmat.config import load_consortium

    path = project / "consortium.yaml"
    ways = {m.site: m.transport for m in load_consortium(path).members}
    carried = ", ".join(s for s, way in ways.items() if way == "files") or "none so far"
    if site not in ways:
        raise ConfigError(f"{path}: there is no member '{site}'", fix=f"members with transport: files are {carried}")
    if ways[site] != "files":
        raise ConfigError(
            f"{path}: {site} answers over its own connection", fix=f"set transport: files for it; those with it are {carried}"
        )


def _revoked(project: Path) -> list[str]:
    from fedmat import files

    path = project / "revoked.json"
    try:
        return [str(serial) for serial in files.read_json(path)["serials"]]
    except (KeyError, TypeError):
        raise StateError(f"{path}: damaged", fix="restore it: without it, revoked certificates would count") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"{path}: cannot read it ({error.strerror})", fix="name the operator's project folder") from None


def _failure(reply: bytes | Failure) -> dict[str, str] | None:
    """Returns a failure for a machine; None for an answer."""
    if isinstance(reply, bytes):
        return None
    return {"kind": type(reply).__name__.lower(), "reason": reply.reason, "detail": reply.detail}


def _why(failure: dict[str, str]) -> str:
    told = f"{failure['reason']}: {failure['detail']}" if failure["detail"] else failure["reason"]
    return "".join(c if c.isprintable() else "?" for c in told)  # another's words, on this terminal


def _tell(as_json: bool, answer: dict[str, Any], said: str, then: str) -> None:
    from fedmat import console

    if as_json:
        console.write_json({**answer, "next": then})
        return
    console.say(said)
    typer.echo(f"next: {then}", err=True)  # in one line, however narrow: there is a command in it to be copied


def _now() -> datetime:
    from datetime import UTC

    return datetime.now(UTC)
