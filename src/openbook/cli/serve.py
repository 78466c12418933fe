"""`openbook serve`: models behind the OpenAI API, and a page to chat on."""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openbook.cli.options import cache_option, dtype_option, json_option, print_json, profile_option
from openbook.core.errors import UserError

if TYPE_CHECKING:
    from openbook.engine.choices import CacheKind, Dtype, Profile
    from openbook.server.served_model import ServedModel
    from openbook.server.settings import ServerSettings

DEFAULT_MODEL = "nano"
EXPORTS = ("k8s", "systemd", "compose")
LOG_LEVELS = ("error", "warning", "info", "debug")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_NOT_WITH_EXPORT = (
    ("api_keys", "--api-key", "take the key from a secret"),
    ("allow_no_key", "--allow-no-key", "take the key from a secret"),
    ("on_ray", "--ray", "run one server with its engines"),
    ("as_json", "--json", "are no JSON"),
)
# What an exported file says in its own way, or takes from a secret.
_NOT_EXPORTED = {
    *("models", "host", "port", "api_keys", "api_key_file", "allow_no_key", "makes_key"),
    *("export", "image", "as_json"),
}


class Size(click.ParamType[int]):
    """A number of bytes: 512M, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size: expected a number of bytes such as 512M or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


@click.command("serve", short_help="Serve models: the OpenAI API, and a page to chat on.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar="OPENBOOK_API_KEY",
    show_envvar=True,
    help="A key that opens the API, plain or hashed; may be given repeatedly. Others see a command line: rather use "
    "the environment or a file.",
)
@click.option("--api-key-file", type=Path, metavar="FILE", help="Keys, one a line, plain or as --make-key writes them.")
@click.option("--make-key", "makes_key", is_flag=True, help="Print a new key and its hash for --api-key-file, and end.")
@click.option("--allow-no-key", is_flag=True, help="Listen beyond this machine without a key.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name that clients may call this server by, beside localhost and IP addresses: of a proxy before it, say. "
    "Asked for where the server listens on this machine alone, or without a key.",
)
@click.option(
    "--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="A web page's origin that may use the API."
)
@click.option(
    "--requests-per-minute", type=click.IntRange(1), metavar="N", help="Most requests of one key.  [default: no limit]"
)
@click.option(
    "--tokens-per-minute", type=click.IntRange(1), metavar="N", help="Most tokens of one key.  [default: no limit]"
)
@click.option("--max-body", type=Size(), default="32MiB", show_default=True, help="Largest request.")
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    help="What running answers get when the server is told to stop (SIGTERM, Ctrl-C); then they end with an error.",
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Engine processes per model.")
@click.option("--ray", "on_ray", is_flag=True, help="Run the workers on a Ray cluster; needs the extra ray.")
@click.option("--ray-address", metavar="ADDRESS", help="Of the cluster.  [default: the one that this machine is in]")
@click.option("--max-running", type=click.IntRange(1), default=64, show_default=True, help="Sequences at a time.")
@click.option(
    "--max-queue", type=click.IntRange(1), default=1024, show_default=True, help="Requests that wait; more get a 429."
)
@click.option(
    "--max-step-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens of one step: fewer come more evenly, more read prompts faster.",
)
@click.option(
    "--max-model-len", type=click.IntRange(1), metavar="N", help="Tokens of one sequence.  [default: the model's limit]"
)
@click.option(
    "--cache-memory", type=Size(), default="1GiB", show_default=True, help="For keys and values, of each worker."
)
@click.option(
    "--prefix-cache/--no-prefix-cache", default=True, show_default=True, help="Reuse what prompts have in common."
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(0),
    help="Most tokens to guess ahead; 0 for none.  [default: 4 with --draft-model, else 0]",
)
@click.option("--draft-model", metavar="MODEL", help="A small model that guesses.  [default: from the text itself]")
@click.option("--served-name", "served_names", multiple=True, metavar="NAME", help="What clients call the model.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=PATH", help="A LoRA adapter in PEFT's format: model:NAME."
)
@click.option("--adapter-dir", type=Path, metavar="DIR", help="Adapters in it may be loaded while serving.")
@click.option(
    "--response-store",
    metavar="DIR|off",
    help="Where /v1/responses keeps conversations, each for its key alone; off keeps none.  "
    "[default: ~/.local/state/openbook/responses, or in $XDG_STATE_HOME]",
)
@click.option(
    "--response-store-size", type=Size(), default="1GiB", show_default=True, help="Then the oldest conversations go."
)
@click.option(
    "--response-store-days",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="How long a conversation is kept that nobody goes on with.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@profile_option
@cache_option
@dtype_option
@click.option("--export", type=click.Choice(EXPORTS), help="Print a file that runs this command elsewhere, and end.")
@click.option("--image", metavar="NAME", help="With --export: the container's image.  [default: one that it describes]")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="warning", show_default=True, help="On stderr.")
@json_option
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Serve each MODEL (nano if none is given) behind the OpenAI API, with a page to chat on.

    Clients of the OpenAI API need only the address: base_url="http://127.0.0.1:8000/v1". /docs describes all endpoints.
    """
    if options["makes_key"]:
        _make_key(options["as_json"])
        return
    models = options["models"] = options["models"] or (DEFAULT_MODEL,)
    _require_one_model(models, options)
    adapters = _parse_adapters(options["adapters"])
    settings = _settings(options)
    if options["ray_address"] is not None and not options["on_ray"]:
        raise UserError("--ray-address is given without --ray: give both, or leave it out")
    if options["image"] is not None and options["export"] not in ("k8s", "compose"):
        raise UserError("--image is for --export k8s and --export compose: leave it out")
    if options["export"] is not None:
        click.echo(_export(context, options), nl=False)
        return
    if not (settings.is_loopback or settings.api_keys or options["allow_no_key"]):
        raise UserError(
            f"--host {settings.host} lets others in and there is no API key: give --api-key or OPENBOOK_API_KEY, or "
            "--allow-no-key if everybody who reaches it may use it"
        )
    from openbook.server.app import create_app
    from openbook.server.run import listen, serve, url_of

    listener = listen(options["host"], options["port"])
    try:
        app = create_app(_start(models, options), settings)

        def on_ready() -> None:
            url, names = url_of(listener), [model.name for model in app.state.openbook.models]
            if options["as_json"]:
                print_json({"url": url, "models": names})
            click.echo(f"{', '.join(names)}: {url} (API at {url}/v1, docs at {url}/docs; Ctrl-C stops)", err=True)

        serve(app, listener, on_ready, adapters=adapters, log_level=options["log_level"])
    finally:
        listener.close()


def _make_key(as_json: bool) -> None:
    from openbook.server.auth import hash_key, new_key

    key = new_key()
    hashed = hash_key(key)
    if as_json:
        print_json({"key": key, "hash": hashed})
        return
    click.echo(hashed)
    click.echo(f"(the key, shown this once: {key} - the line above goes into the file for --api-key-file)", err=True)


def _require_one_model(models: Sequence[str], options: dict[str, Any]) -> None:
    for name, option in (
        ("served_names", "--served-name"),
        ("adapters", "--adapter"),
        ("draft_model", "--draft-model"),
    ):
        if options[name] and len(models) > 1:
            raise UserError(f"{option} is given with {len(models)} models: it is for one; serve that one alone")


def _parse_adapters(given: Sequence[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for text in given:
        name, mark, path = text.partition("=")
        if not mark or not path or not _ADAPTER_NAME.fullmatch(name):
            raise UserError(f"--adapter is {text!r}: expected NAME=PATH, the name of letters, digits, '.', '_' and '-'")
        if name in adapters:
            raise UserError(f"--adapter names {name!r} twice: give each adapter a name of its own")
        if not Path(path).is_dir():
            raise UserError(f"--adapter {name}: there is no folder {path}; give one with adapter_config.json")
        adapters[name] = path
    return adapters


def _settings(options: dict[str, Any]) -> ServerSettings:
    from openbook.server.auth import KeyRing, read_keys
    from openbook.server.settings import ServerSettings

    file, folder = options["api_key_file"], options["adapter_dir"]
    keys = (*options["api_keys"], *(read_keys(file) if file is not None else ()))
    KeyRing(keys)  # refuses what is none
    if folder is not None and not folder.is_dir():
        raise UserError(f"--adapter-dir {folder} is no folder: make it, or give another")
    return ServerSettings(
        host=options["host"],
        api_keys=keys,
        requests_per_minute=options["requests_per_minute"],
        tokens_per_minute=options["tokens_per_minute"],
        max_body_bytes=options["max_body"],
        drain_s=options["drain_seconds"],
        cors_origins=options["cors_origins"],
        allowed_hosts=options["allowed_hosts"],
        adapter_dir=folder,
        response_store=_response_store(options["response_store"]),
        response_store_bytes=options["response_store_size"],
        response_store_days=options["response_store_days"],
    )


def _response_store(given: str | None) -> Path | None:
    from openbook.server.response_store import default_folder

    if given is None:
        return default_folder()
    return None if given == "off" else Path(given)


def _start(models: Sequence[str], options: dict[str, Any]) -> list[ServedModel]:
    """Load the models."""
    from openbook.engine.engine import EngineSettings
    from openbook.engine.start import LoadOptions, start_engine
    from openbook.server.from_engine import Started, served_model

    profile: Profile | None = options["profile"]
    dtype: Dtype | None = options["dtype"]
    cache: CacheKind | None = options["cache"]
    load = LoadOptions(profile=profile, device=options["device"], dtype=dtype, cache=cache)
    settings = EngineSettings(
        max_running=options["max_running"],
        max_waiting=options["max_queue"],
        max_step_tokens=options["max_step_tokens"],
        cache_bytes=options["cache_memory"],
        max_model_len=options["max_model_len"],
        has_prefix_cache=options["prefix_cache"],
        num_draft_tokens=_num_draft_tokens(options),
        draft_model=options["draft_model"],
    )
    served = []
    for model in models:
        started: Started
        if options["on_ray"]:
            from openbook.server.ray_replicas import start_ray_engines

            started = start_ray_engines(model, load, settings, options["workers"], options["ray_address"] or "auto")
        elif options["workers"] == 1:
            started = start_engine(model, load, settings)
        else:
            from openbook.engine.start_many import start_engines

            started = start_engines(model, load, settings, options["workers"])
        served.append(served_model(started, options["served_names"]))
    return served


def _num_draft_tokens(options: dict[str, Any]) -> int:
    given, draft_model = options["draft_tokens"], options["draft_model"]
    if given == 0 and draft_model is not None:
        raise click.UsageError("--draft-tokens is 0, and --draft-model is given: leave out one of them")
    return (4 if draft_model is not None else 0) if given is None else int(given)


def _export(context: click.Context, options: dict[str, Any]) -> str:
    """The file for `--export`: this command with the options that were given."""
    from openbook.checkpoint.locate import PACKAGED, bundled_names
    from openbook.server.export import Deployment, container_path, memory_need

    on_command_line = click.core.ParameterSource.COMMANDLINE
    for name, option, reason in _NOT_WITH_EXPORT:
        if context.get_parameter_source(name) is on_command_line:
            raise UserError(f"{option} does not go with --export, whose files {reason}: leave it out")
    if options["response_store"] not in (None, "off"):
        raise UserError(
            f"--response-store {options['response_store']} does not go with --export, whose files keep responses in a "
            "volume of their own: leave it out, or give off"
        )
    named = {*bundled_names(), *PACKAGED}
    mounts: list[tuple[str, str]] = []

    def placed(path: str) -> str:
        """A path of this machine as the exported command names it."""
        here = str(Path(path).resolve())
        if options["export"] == "systemd":
            return here
        mounts.append((here, container_path(here, len(mounts))))
        return mounts[-1][1]

    def placed_model(model: str) -> str:
        return placed(model) if model not in named and Path(model).exists() else model

    arguments = [placed_model(model) for model in options["models"]]
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is on_command_line
        if name in _NOT_EXPORTED or not is_given or not isinstance(parameter, click.Option):
            continue
        value = options[name]
        for one in value if parameter.multiple else [value]:
            if parameter.is_flag:
                arguments.append(parameter.opts[0] if one else parameter.secondary_opts[0])
            elif name == "adapters":
                key, _, path = one.partition("=")
                arguments += [parameter.opts[0], f"{key}={placed(path)}"]
            elif name == "draft_model":
                arguments += [parameter.opts[0], placed_model(one)]
            elif isinstance(one, Path):
                arguments += [parameter.opts[0], placed(str(one))]
            else:
                arguments += [parameter.opts[0], str(one)]
    key_file = options["api_key_file"]
    deployment = Deployment(
        arguments=arguments,
        host=options["host"],
        port=options["port"],
        drain_s=options["drain_seconds"],
        mounts=mounts,
        key_file=None if key_file is None else str(key_file.resolve()),
        image=options["image"],
        workers=options["workers"],
        memory_bytes=memory_need(options["models"], options["workers"], options["cache_memory"]),
        program=(sys.executable, "-m", "openbook.cli.main"),
        user=getpass.getuser(),
    )
    return deployment.render(options["export"])
