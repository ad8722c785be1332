"""The commands that set up a consortium between organisations: ``fedmat consortium ...`` and ``fedmat site join | certificate | renew``.

Knows: what the operator and a party's engineer type, and the time. Refuses to know: kits, keys and certificates
(``fedmat.provision``). No private key is ever shown or sent; what goes to somebody else is named with who gets it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmat.cli_data import site_app
from fedmat.commands import Group, Json
from fedmat.errors import ConfigError, FedmatError

consortium_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Run a consortium between organisations: invite parties, certify them, end it."
)

Project = Annotated[Path, typer.Option(help="The operator's project folder.")]
Home = Annotated[Path, typer.Option("--home", help="The party's own folder, on its own machine.")]
PartyName = Annotated[
    str, typer.Argument(metavar="PARTY", help="A site of the consortium file, or aggregator, auditor, notary, reference.")
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How many days from now the certificate counts.")]


# --- the operator ------------------------------------------------------------------------------------------------


@consortium_app.command("init")
def consortium_init(
    consortium: Annotated[Path, typer.Argument(metavar="CONSORTIUM", help="The consortium file.")],
    project: Project,
    host: Annotated[str, typer.Option(help="Name or IPv4 address at which every party reaches the server.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one port that is open to the parties.")] = 8002,
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make the operator's project folder: the consortium's root, the server's kit and the operator's own.

    The root counts for ten years, the server's and the operator's certificates for --days.

    Example:  fedmat consortium init consortium.yaml --project project --host fedmat.example.org
    """
    from fedmat import console, provision

    made = provision.init(consortium, project, host=host, port=port, now=_now(), days=days)
    root = _root(made)
    if as_json:
        console.write_json({"project": str(project), "consortium": made.consortium, "host": host, "port": port, "root": root})
        return
    console.show_where([
        ("project", f"{console.show_path(project)} (its ca/ca.key decides who takes part: keep a copy offline)"),
        ("parties reach", f"{host}:{port}"),
        ("root's fingerprint", spoken(root)),
        ("then", f"fedmat consortium invite PARTY --project {console.show_path(project)}"),
        ("to invite", ", ".join([*made.config.roster, *provision.needed_roles(made.config)])),
    ])  # fmt: skip


@consortium_app.command("update")
def consortium_update(
    consortium: Annotated[Path, typer.Argument(metavar="CONSORTIUM", help="The changed consortium file.")],
    project: Project,
    as_json: Json = False,
) -> None:
    """Take a changed consortium file, and the charter it names, into the project.

    Keys and certificates stay. Parties that are to hold the new file get a new kit and join again with it.

    Example:  fedmat consortium update consortium.yaml --project project
    """
    from fedmat import console, provision

    fresh = provision.update(consortium, project)
    if as_json:
        console.write_json({"project": str(project), "can_be_invited": list(fresh)})
        return
    console.say(f"{project}: holds {consortium} now")
    console.say(f"next: invite {', '.join(fresh)}" if fresh else "next: invite a party again to send it the new file")


@consortium_app.command("invite")
def consortium_invite(
    party: PartyName,
    project: Project,
    organisation: Annotated[
        str | None, typer.Option(help="Who runs a role.", show_default="as the consortium file or the charter says")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the kit of a party. It holds no private key.

    Example:  fedmat consortium invite acme-cells --project project
    """
    from fedmat import console, provision

    kit = provision.invite(project, party, _now(), organisation=organisation)
    root = _root(provision.read_project(project))
    if as_json:
        console.write_json({"party": party, "kit": str(kit), "root": root})
        return
    console.show_where([
        (f"send to {party}", console.show_path(kit)),
        ("tell by telephone", f"{spoken(root)} (fingerprint of the root)"),
        (f"at {party}", f"fedmat site join {kit.name} --home FOLDER --fingerprint TOLD"),
    ])  # fmt: skip


@consortium_app.command("admit")
def consortium_admit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The PARTY.request that the party sent.")],
    project: Project,
    days: Days = 365,
    fingerprint: Annotated[
        str | None, typer.Option(help="Of the party's key, as the party told it by telephone.", show_default="it is printed")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The party has a certificate: revoke it for this new one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign the certificate that an invited party asks for.

    Example:  fedmat consortium admit acme-cells.request --project project
    """
    from fedmat import console, provision

    made = provision.admit(project, _bytes(file), _now(), days=days, replace_key=replace, fingerprint=fingerprint)
    if as_json:
        console.write_json({
            "party": made.party,
            "certificate": str(made.certificate),
            "fingerprint": made.fingerprint,
            "vouched": made.vouched,
            "revoked": made.replaced,
            "not_after": made.not_after.isoformat(),
        })  # fmt: skip
        return
    if fingerprint is not None:
        then = "it is the one that was told"
    elif made.vouched:
        then = "the party's key of before vouches for it"
    else:
        then = "compare it by telephone before you send the certificate"
    console.show_where([
        ("key's fingerprint", f"{spoken(made.fingerprint)} ({then})"),
        (f"send to {made.party}", console.show_path(made.certificate)),
        ("counts until", made.not_after.date().isoformat()),
        *([("revoked", f"serial {made.replaced}")] if made.replaced else []),
        (f"at {made.party}", f"fedmat site certificate {made.certificate.name} --home FOLDER"),
    ])  # fmt: skip


@consortium_app.command("members")
def consortium_members(project: Project, as_json: Json = False) -> None:
    """List every party: where it stands, and how long its certificate counts.

    Ends with what stops the server from starting, if something does.

    Example:  fedmat consortium members --project project
    """
    from fedmat import console, provision

    found = provision.read_project(project)
    missing = [p for p in (*found.config.roster, *provision.needed_roles(found.config)) if p not in found.members]
    trouble: FedmatError | None = None
    try:
        warnings = provision.check_project(project, _now()).warnings
    except FedmatError as error:
        trouble, warnings = error, ()
    if as_json:
        from dataclasses import asdict

        console.write_json({
            "consortium": found.consortium,
            "members": {n: asdict(m) for n, m in sorted(found.members.items())},
            "not_invited": missing,
            "revoked": list(found.revoked),
            "warnings": list(warnings),
            "ok": trouble is None,
        })  # fmt: skip
    else:
        rows: list[tuple[str, ...]] = [
            (n, m.organisation, m.state, (m.not_after or "")[:10], (m.fingerprint or "")[:16]) for n, m in found.members.items()
        ]
        rows += [(n, "", "not invited", "", "") for n in missing]
        columns = ("party", "organisation", "state", "counts until", "key's fingerprint begins")
        console.show_rows("", columns, sorted(rows))
        for note in warnings:
            console.say(f"note: {note}")
    if trouble is not None:
        raise trouble


@consortium_app.command("revoke")
def consortium_revoke(party: PartyName, project: Project, as_json: Json = False) -> None:
    """End a party's membership.

    The server refuses its certificate from now on, and a connection that is open ends.

    Example:  fedmat consortium revoke acme-cells --project project
    """
    from fedmat import console, provision

    serial = provision.revoke(project, party)
    ended = _disconnected(project, party)
    if as_json:
        console.write_json({"party": party, "serial": serial, "disconnected": ended})
        return
    console.say(f"{party}: revoked" + (f" (serial {serial})" if serial else "; it had no certificate yet"))
    console.say("its connection was ended" if ended else "it was not connected, or the server does not run")
    console.say("next: agree on a charter without it (docs/keys.md)")


def _disconnected(project: Path, party: str) -> bool:
    """Ends a party's registration at a server that runs; its next one is refused."""
    if not (project / "run" / "processes.json").exists():
        return False
    from fedmat.errors import ServiceError
    from fedmat.federation.flare import Session

    try:
        with Session(project / "admin") as session:
            connected = party in session.system().parties
            if connected:
                session.remove(party)
            return connected
    except ServiceError:
        return False


@consortium_app.command("renew")
def consortium_renew(project: Project, days: Days = 365, as_json: Json = False) -> None:
    """Give the server and the operator new keys and certificates, and write their settings anew.

    Needed once a year, and when the project folder was moved. Parties notice nothing.

    Example:  fedmat consortium renew --project project
    """
    from fedmat import console, provision

    ends = provision.renew_project(project, _now(), days=days)
    if as_json:
        console.write_json({"project": str(project), "not_after": ends.isoformat()})
        return
    console.say(f"{project}: new certificates, until {ends.date()}; start the server again")


# --- a party -----------------------------------------------------------------------------------------------------


@site_app.command("join")
def site_join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The PARTY.kit that the operator sent.")],
    home: Home,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="SITE_YAML", help="The site's site.yaml; a role has none.")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Of the root, as the operator told it by telephone.", show_default="it is printed")
    ] = None,
    as_json: Json = False,
) -> None:
    """Join a consortium with its kit: check it, make the party's private key, here, and ask for a certificate.

    With a newer kit of the same party: takes its files over; key, certificate and policy stay.

    Example:  fedmat site join acme-cells.kit --home /srv/fedmat/acme --data site.yaml --fingerprint "8d2f 11c0 ..."
    """
    from fedmat import console, provision

    found = provision.read_kit(kit, _now())
    request = provision.join(found, home, site_file=data, fingerprint=fingerprint)
    asked = request.is_file()
    key = provision.request_fingerprint(request.read_bytes()) if asked else None
    if as_json:
        console.write_json({
            "party": found.party, "consortium": found.consortium, "home": str(home), "root": found.root, "key": key,
            "request": str(request) if asked else None, "warnings": list(found.warnings),
        })  # fmt: skip
        return
    for note in found.warnings:
        console.say(f"note: {note}")
    told = "it is the one that was told" if fingerprint else "compare it with the operator's by telephone before you go on"
    where = [
        ("party", f"{found.party} of {found.organisation} in {found.consortium}"),
        ("root's fingerprint", f"{spoken(found.root)} ({told})"),
        ("folder", f"{console.show_path(home)} (the private key is in it and stays there)"),
    ]
    if found.kind == "site":
        where.append(("policy", f"{console.show_path(home / provision.POLICY)}: read it, it is yours to change"))
    if asked and key:
        where += [
            ("send to the operator", console.show_path(request)),
            ("tell by telephone", f"{spoken(key)} (fingerprint of your key)"),
            ("then", f"fedmat site certificate {provision.CERTIFICATE.format(found.party)} --home {console.show_path(home)}"),
        ]
    console.show_where(where)


@site_app.command("certificate")
def site_certificate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The PARTY.certificate that the operator sent.")],
    home: Home,
    as_json: Json = False,
) -> None:
    """Put a party's certificate in force, the first one or a renewed one.

    Example:  fedmat site certificate acme-cells.certificate --home /srv/fedmat/acme
    """
    from fedmat import console, provision

    ends = provision.install(home, _bytes(file), _now())
    found = provision.check_home(home, _now())
    if as_json:
        console.write_json({"party": found.party, "home": str(home), "not_after": ends.isoformat()})
        return
    console.show_where([
        ("party", f"{found.party} in {found.consortium}"),
        ("counts until", ends.date().isoformat()),
        ("server", f"{found.host}:{found.port}"),
    ])  # fmt: skip


@site_app.command("renew")
def site_renew(home: Home, as_json: Json = False) -> None:
    """Make a new key beside the old one, and ask for its certificate. The old one counts until the new one is installed.

    Example:  fedmat site renew --home /srv/fedmat/acme
    """
    from fedmat import console, provision

    request = provision.renew(home, _now())
    key = provision.request_fingerprint(request.read_bytes())
    if as_json:
        console.write_json({"request": str(request), "key": key})
        return
    console.show_where([
        ("send to the operator", console.show_path(request)),
        ("fingerprint of the new key", spoken(key)),
        ("at the operator", f"fedmat consortium admit {request.name} --project FOLDER --replace"),
        ("then", f"fedmat site certificate {request.stem}.certificate --home {console.show_path(home)}"),
    ])  # fmt: skip


def spoken(digest: str) -> str:
    """Returns a digest in groups of four, to be read aloud."""
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def _root(project: Any) -> str:
    from fedmat import credentials

    return credentials.facts((project.folder / "ca/ca.crt").read_bytes()).fingerprint


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})", fix="name the file that was sent") from None


def _now() -> datetime:
    from datetime import UTC

    return datetime.now(UTC)
