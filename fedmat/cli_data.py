"""The commands about data: ``fedmat site init | check | snapshot`` and ``fedmat data list | get``.

Knows: what a site's data manager types. Refuses to know: how records are read and judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmat.commands import Group, Home, Json
from fedmat.errors import ConfigError, DataError

site_app = typer.Typer(cls=Group, no_args_is_help=True, help="Bring your own data: draft, check and version a site's records.")
data_app = typer.Typer(cls=Group, no_args_is_help=True, help="Public datasets that the example consortia read.")

# --- a site's own data -------------------------------------------------------------------------------------------

SiteFile = Annotated[Path, typer.Argument(metavar="SITE_YAML", help="The site's site.yaml.")]
Charter = Annotated[
    Path | None,
    typer.Option("--consortium", help="Its consortium file.", show_default="the nearest one above that lists the site"),
]


@site_app.command("init")
def site_init(
    data: Annotated[Path, typer.Argument(help="CSV, Excel, Parquet or SQLite file, or a folder or tar archive of CIF files.")],
    name: Annotated[str, typer.Option(help="Name of the site: lower case, digits, dashes.")] = "my-site",
    organisation: Annotated[str, typer.Option(help="Who owns the records.")] = "My organisation",
    record_type: Annotated[
        str | None, typer.Option(help="Of the data contract.", show_default="what fits the columns best")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("site.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Draft a site.yaml from your file's column names.

    Columns are matched to contract fields by name. Units are never guessed: each waits as "?" for you to confirm.

    Example:  fedmat site init lab.csv --name acme-cells --organisation "Acme Cells" --out site.yaml
    """
    from fedmat import console, files
    from fedmat.data import draft

    if out.exists() and not force:
        raise ConfigError(
            f"{out} is there already, and nothing was written", fix="name another file with --out, or use --force"
        )
    found = draft.draft(data, out.resolve().parent, site=name, organisation=organisation, record_type=record_type)
    files.write_atomic(out, found.text.encode())
    console.say(f"{out}: record type {found.record_type}, {len(found.mapped)} fields mapped")
    console.show_rows("", ("contract field", "your column"), list(found.mapped.items()))
    if found.missing:
        console.say(f"required, but no column was found: {', '.join(found.missing)}")
    console.say(f'next: replace every "{draft.TO_CONFIRM}" in {out}, then: fedmat site check {out}')


@site_app.command("check")
def site_check(
    site_yaml: SiteFile,
    consortium: Charter = None,
    target: Annotated[
        str | None, typer.Option(help="Contract field to be predicted.", show_default="the consortium's target")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what is wrong with your data and mapping.

    Meant for before you join: it speaks in your own column names, names rows but no values, and writes nothing.

    Example:  fedmat site check examples/cells/sites/ev-cells/site.yaml
    """
    from fedmat import console, places, wire
    from fedmat.config import load_site
    from fedmat.data import draft, records

    site = load_site(site_yaml)
    open_points = draft.unconfirmed(site)
    if open_points:
        raise ConfigError(
            f"{site_yaml}: {len(open_points)} points are not confirmed yet:\n  " + "\n  ".join(open_points),
            fix=f'replace every "{draft.TO_CONFIRM}" in the file by what is true of your data',
        )
    member = places.consortium_of(site_yaml, consortium)
    wanted = [target] if target else [t.target for t in member[1].tasks] if member else []
    if not wanted:
        raise ConfigError(
            "what is to be predicted is not known: no consortium.yaml above lists this site file",
            fix="name the consortium file with --consortium, or the field with --target",
        )
    with console.working(f"checking {site_yaml}"):
        admission = member[1].admission if member else None
        found = records.check(site, site_yaml.resolve().parent, target=wanted, admission=admission)
    if as_json:
        console.write_json({**wire.plain(found), "ok": found.ok})
    else:
        console.show_check(found)
    if not found.ok:
        raise typer.Exit(DataError.exit_code)


@site_app.command("snapshot")
def site_snapshot(site_yaml: SiteFile, consortium: Charter = None, home: Home = None, as_json: Json = False) -> None:
    """Validate your records and keep them as a version.

    The version lies in the site's own workspace, which is a git and DVC repository of its own.

    Example:  fedmat site snapshot examples/cells/sites/ev-cells/site.yaml
    """
    from datetime import UTC, datetime

    from fedmat import console, pipeline, places
    from fedmat.config import load_site

    member = places.consortium_of(site_yaml, consortium)
    if member is None:
        raise ConfigError(f"{site_yaml}: no consortium.yaml above lists this site file", fix="name it with --consortium")
    site = load_site(site_yaml).site
    opened = pipeline.Run(member[0].resolve(), places.workspace(member[0], home))
    with console.working(f"{site}: validating and versioning"):
        snapshot = pipeline.prepare_site(opened, site)
        version = pipeline.version_site(opened, site, datetime.now(UTC))
    if as_json:
        console.write_json({"snapshot": pipeline.as_plain(snapshot), "version": pipeline.as_plain(version)})
        return
    console.show_where([
        ("records", f"{snapshot.n_records:,} accepted, {snapshot.n_rejected:,} rejected"),
        ("dataset", snapshot.sha256),
        ("version", f"{version.tag} in {console.show_path(snapshot.folder)}"),
    ])  # fmt: skip


# --- public data -------------------------------------------------------------------------------------------------

Public = Annotated[Path | None, typer.Option(help="Folder of public data.", show_default="$FEDMAT_DATA or data")]


@data_app.command("list")
def data_list(into: Public = None, as_json: Json = False) -> None:
    """List the public datasets, their publishers and what is here.

    Example:  fedmat data list
    """
    from fedmat import console, wire
    from fedmat.data import download

    folder = _public(into)
    datasets = download.DATASETS.values()
    present = {d.name: download.present(d.name, folder) if d.files else (0, 0) for d in datasets}
    if as_json:
        console.write_json([{**wire.plain(d), "present": present[d.name][0]} for d in datasets])
        return
    rows = [
        (d.name, d.about, f"{sum(f.size for f in d.files) / 1e6:.1f} MB", "{} of {}".format(*present[d.name]), d.repository)
        if d.files
        else (d.name, d.about, "-", "derived here", d.repository or "-")
        for d in datasets
    ]
    console.show_rows("", ("name", "what", "size", "files here", "publisher"), rows, right=("size", "files here"))
    console.say(f"here: {console.show_path(folder)}; fetch one with: fedmat data get NAME")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="As in fedmat data list.")],
    into: Public = None,
) -> None:
    """Download a public dataset, checksum verified; an interrupted download goes on.

    Example:  fedmat data get calisol23 --into data
    """
    from fedmat import console
    from fedmat.data import download

    folder = _public(into)
    with console.downloads() as told:
        path = download.get(name, folder, progress=told)
    console.show_where([("data", console.show_path(path)), ("use", f"export FEDMAT_DATA={folder.resolve()}")])


def _public(into: Path | None) -> Path:
    import os

    return into or Path(os.environ.get("FEDMAT_DATA") or "data")
