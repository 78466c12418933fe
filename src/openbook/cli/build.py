"""`openbook build`: a model from nothing."""

from __future__ import annotations

from pathlib import Path

import click

from openbook.cli.options import json_option, print_json


@click.command(name="build")
@click.argument("recipe", type=click.Path())
@click.option("--out", type=click.Path(path_type=Path), help="Build folder; must not exist.  [default: runs/NAME]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted build in --out; the bytes come out the same.")
@click.option("--until", metavar="STEP", help="Stop after tokenizer, a stage of the recipe, evals or release.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to train.  [default: cpu]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads of training.  [default: all cores]")
@click.option(
    "--compile/--no-compile",
    "is_compiled",
    default=None,
    help="Train through torch.compile.  [default: if there is a C++ compiler]",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that generate data.  [default: all cores]")
@click.option(
    "--keep-states", is_flag=True, help="Ship every saved state in the release, so that any segment can be replayed."
)
@json_option
def command(
    recipe: str,
    out: Path | None,
    resume: bool,
    until: str | None,
    device: str | None,
    threads: int | None,
    is_compiled: bool | None,
    workers: int | None,
    keep_states: bool,
    as_json: bool,
) -> None:
    """Make a model from nothing: tokenizer, data, training, evaluation, release.

    RECIPE is a TOML file such as recipes/nano.toml; it alone decides the weights. --device, --threads and --compile say
    where and how fast. With profile = "exact" in the recipe the bytes depend on none of them; in the fast profile the
    same ones give the same bytes on one machine, and a resumed build keeps those it began with.

    Exact training takes more processes, a power of two, with the same bytes: torchrun --nproc-per-node 2 -m
    openbook.cli.main build RECIPE.
    """
    from openbook.release.build import build
    from openbook.train.parallel import workers_of_environment

    folder = out or Path("runs") / Path(recipe).stem
    try:
        release = build(
            recipe,
            folder,
            resume=resume,
            until=until,
            device=device,
            threads=threads,
            is_compiled=is_compiled,
            workers=workers,
            keep_states=keep_states,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what is done is saved: go on with `openbook build {recipe} --out {folder} --resume`"
        ) from None
    if workers_of_environment().rank > 0:  # under torchrun the first process speaks for all
        return
    is_complete = release.exists()
    if as_json:
        print_json({"build": str(folder), "release": str(release) if is_complete else None})
    elif is_complete:
        click.echo(f"release  {release}")
        click.echo(f"report   {folder / 'report.html'}")
        click.echo(f"try it   openbook chat {release}")
    else:
        click.echo(f"stopped after {until}; go on with `openbook build {recipe} --out {folder} --resume`")
