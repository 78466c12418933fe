"""`openbook verify`: is a release what it says, does its recipe lead to it, and does an answer come out again?"""

from __future__ import annotations

from pathlib import Path

import click

from openbook.cli.options import json_option, print_json, seed_option
from openbook.core.errors import CheckError


@click.command("verify")
@click.argument("release")
@click.option("--replay", type=click.IntRange(1), metavar="K", help="Train K segments again and compare every step.")
@click.option("--rebuild", is_flag=True, help="Build the whole release again and compare every file.")
@seed_option(None, "Of the choice of segments.  [default: a random one, printed]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads of training.  [default: as in the build]")
@click.option("--model", help="The model of a receipt: a name, path or hub id.  [default: the name in the receipt]")
@json_option
def command(
    release: str,
    replay: int | None,
    rebuild: bool,
    seed: int | None,
    threads: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Check a release: its files, and if you ask for it, its training. Or compute the answer of a receipt again.

    RELEASE is a bundled name (nano) or a release folder. Without options the sha256 of every file is compared with
    provenance/manifest.json, the recipe with its hash, names and shapes of the weights with config.json, the links,
    steps and learning rates of the ledger with the recipe, and the weights with the ledger's last line.

    A segment is the steps between two saved states. --replay draws K of them at random where the states are shipped
    (or still stand in the build folder), and otherwise trains the first K from nothing; data that are not at hand are
    made again. --rebuild does everything again, in a temporary folder.

    RELEASE may also be a JSON file with a receipt, or an answer that has one (`openbook run --json` and the server
    write them): then the answer is computed anew from the weights that it names, and compared token by token.

    What differs is a line each and exit status 1; what was not checked is said.
    """
    if Path(release).is_file() and release.endswith(".json"):
        given = {"--replay": replay, "--rebuild": rebuild or None, "--seed": seed, "--threads": threads}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise click.UsageError(f"{wrong[0]} is for releases, and {release} is a receipt: leave it out")
        _check_receipt(release, model, as_json)
        return
    if model is not None:
        raise click.UsageError(f"--model is for receipts, and {release} is none: leave it out")
    if replay is None and not rebuild and (seed, threads) != (None, None):
        option = "--seed" if seed is not None else "--threads"
        raise click.UsageError(f"{option} is for --replay or --rebuild: give one of them too")
    if replay is None and seed is not None:
        raise click.UsageError("--seed chooses the segments of --replay: give that too")
    from openbook.verify.verification import verify

    result = verify(release, replay=replay or 0, rebuild=rebuild, seed=seed, threads=threads)
    if as_json:
        print_json(result)
    else:
        for verdict in result.verdicts:
            click.echo(verdict)
        for difference in result.differences:
            click.echo(difference)
        if not result.differences:
            click.echo(f"manifest {result.manifest_sha256}")
            click.echo(f"recipe   {result.recipe_sha256}")
        for note in result.notes:
            click.echo(f"note: {note}")
        if not result.differences:
            for item in result.not_checked:
                click.echo(f"not checked: {item}")
    if result.verdicts and result.differences:  # the files are whole: it is the training that differs
        difference = result.differences[0]
        raise CheckError(f"{result.release}: {difference.path}: {difference.detail}")
    if result.differences:
        num_paths = len({difference.path for difference in result.differences})
        raise CheckError(
            f"{result.release}: {num_paths} file{'s differ' if num_paths > 1 else ' differs'} "
            f"({', '.join(dict.fromkeys(d.path for d in result.differences))}); get the release anew, or rebuild it"
        )


def _check_receipt(path: str, model: str | None, as_json: bool) -> None:
    from openbook.verify.receipts import verify_receipt

    result = verify_receipt(path, model)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result.verdict}  {result.coverage}".rstrip())
    if result.difference:
        raise CheckError(f"{path}: {result.difference}")
