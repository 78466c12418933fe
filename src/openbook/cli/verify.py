"""`openbook verify`: is a release what its manifest says?"""

from __future__ import annotations

import click

from openbook.cli.options import json_option, print_json
from openbook.core.errors import CheckError


@click.command("verify")
@click.argument("release")
@json_option
def command(release: str, as_json: bool) -> None:
    """Check the files of a release against its manifest.

    RELEASE is a bundled name (nano) or a release folder. Compares the sha256 of every file with
    provenance/manifest.json, the recipe with its hash, and names and shapes of the weights with config.json.
    One line for each file that is missing, added, changed or invalid, and exit status 1.
    """
    from openbook.verify.integrity import verify

    result = verify(release)
    if as_json:
        print_json(result)
    elif result.verdict == "INTEGRITY":
        click.echo(
            f"INTEGRITY  {result.release}: {result.num_files} files, {result.num_bytes / 1e6:.1f} MB, "
            f"{result.num_parameters:,} parameters, all as in the manifest"
        )
        click.echo(f"manifest {result.manifest_sha256}")
        click.echo(f"recipe   {result.recipe_sha256}")
        for item in result.not_checked:
            click.echo(f"not checked: {item}")
    else:
        for difference in result.differences:
            click.echo(difference)
    if result.differences:
        num_paths = len({difference.path for difference in result.differences})
        raise CheckError(
            f"{result.release}: {num_paths} file{'s differ' if num_paths > 1 else ' differs'} "
            f"({', '.join(dict.fromkeys(d.path for d in result.differences))}); get the release anew, or rebuild it"
        )
