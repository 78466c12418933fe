"""`openbook serve --export`: files that run the same command under Kubernetes, systemd or Docker Compose.

Secrets are never part of them: the API key comes from the environment or from a file that is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePath
from typing import Literal

Kind = Literal["k8s", "systemd", "compose"]
KINDS: tuple[Kind, ...] = ("k8s", "systemd", "compose")

_TEMPLATES: Mapping[Kind, str] = {
    "k8s": "k8s.yaml.jinja",
    "systemd": "openbook.service.jinja",
    "compose": "compose.yaml.jinja",
}
_STOP_GRACE_S = 15  # behind the time for running answers
_CACHE = "/cache"  # of downloaded models and stored responses, in a container
_KEYS = "/run/secrets/openbook-keys"  # the file of API keys there
_UID = 65534  # nobody
_PROCESS_BYTES = 1 << 30  # of a process, beside weights and cache
_HEALTH_CHECK = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health', timeout=4)"
_HOMES = ("/home", "/root")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a server is run.

    Args:
        arguments: of `openbook serve`, without those that say where it listens and with which keys. For a container
            they name paths as they are there.
        host, port: where clients reach it. In a container it listens on every address, and Compose publishes the port.
        drain_s: seconds that running answers get when it is stopped.
        mounts: paths here and in a container, of models and adapters.
        key_file: path here of the file of API keys; None: the key is in OPENBOOK_API_KEY.
        program: the command here, for systemd.
        user: who runs it under systemd where the program or a model lies in a home; else it has a user of its own.
        image: of the container; None: one that is made of Openbook's sources.
        workers: engine processes, each of which is granted a core at least.
        memory_bytes: of all processes together, see `memory_need`; None: 4 GiB for each.
    """

    arguments: Sequence[str]
    host: str
    port: int
    drain_s: float
    mounts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    key_file: str | None = None
    program: Sequence[str] = ("openbook",)
    user: str = "nobody"
    image: str | None = None
    workers: int = 1
    memory_bytes: int | None = None

    @property
    def uses_gpu(self) -> bool:
        """Whether a model is loaded onto a GPU."""
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return any(option == "--device" and value.startswith("cuda") for option, value in pairs)

    def render(self, kind: Kind) -> str:
        """The text of the file."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # what is not plain text goes through one of these
        )
        environment.filters.update(_FILTERS)
        image = self.image or f"openbook:{metadata.version('openbook')}"
        dockerfile = environment.get_template("Dockerfile.jinja").render(cache=_CACHE, uid=_UID).rstrip()
        return environment.get_template(_TEMPLATES[kind]).render(
            service=self,
            command=self._here() if kind == "systemd" else self._contained(),
            image=image,
            dockerfile=dockerfile,
            environment={"HF_HOME": _CACHE, "XDG_STATE_HOME": _CACHE, "HOME": "/tmp"},
            cache=_CACHE,
            keys=_KEYS,
            uid=_UID,
            published=f"{_published(self.host)}:{self.port}:{self.port}",
            stop_s=round(self.drain_s) + _STOP_GRACE_S,
            health_check=_HEALTH_CHECK.format(port=self.port),
            memory=f"{-(-(self.memory_bytes or self.workers << 32) >> 20)}Mi",
            lives_at_home=any(_is_at_home(word) for word in (*self.program, *self.arguments)),
        )

    def _contained(self) -> list[str]:
        keys = ["--api-key-file", _KEYS] if self.key_file is not None else []
        return ["openbook", "serve", *self.arguments, "--host", "0.0.0.0", "--port", str(self.port), *keys]

    def _here(self) -> list[str]:
        return [*self.program, "serve", *self.arguments, "--host", self.host, "--port", str(self.port)]


def container_path(path: str, index: int) -> str:
    """Where a path of this machine is mounted in a container; `index` tells equal names apart."""
    return f"/mounted/{index}/{PurePath(path).name}"


def memory_need(models: Sequence[str], workers: int, cache_bytes: int) -> int | None:
    """Bytes that a server takes, at most; None where a model's files are not on this machine.

    Args:
        models: names or paths; nothing is downloaded.
        workers: processes of each model.
        cache_bytes: for keys and values, of each process.

    Raises:
        UserError: the files of a model are damaged.
    """
    from openbook.checkpoint.locate import PACKAGED, bundled_names, locate
    from openbook.checkpoint.memory import plan_memory
    from openbook.checkpoint.model_source import open_model

    total = 0
    for model in models:
        if model not in (*bundled_names(), *PACKAGED) and not Path(model).expanduser().exists():
            return None
        path = locate(model)
        plan = plan_memory(path, open_model(path).config)
        total += workers * (plan.weight_bytes + plan.compute_bytes + cache_bytes + _PROCESS_BYTES)
    return total


def _is_at_home(word: str) -> bool:
    path = PurePath(word.rpartition("=")[2])  # NAME=PATH of an adapter too
    return any(path.is_relative_to(home) for home in _HOMES)


def _published(host: str) -> str:
    return f"[{host}]" if ":" in host else "127.0.0.1" if host == "localhost" else host


def _quoted(text: str) -> str:
    """A string in YAML: JSON's are valid there."""
    return json.dumps(text, ensure_ascii=False)


def _words(escape: Callable[[str], str]) -> Callable[[Sequence[str]], str]:
    return lambda words: f"[{', '.join(_quoted(escape(word)) for word in words)}]"


def _compose_escaped(text: str) -> str:
    return text.replace("$", "$$")  # else Compose puts variables in


def _k8s_escaped(text: str) -> str:
    return text.replace("$(", "$$(")  # likewise


def _systemd_word(text: str) -> str:
    """One argument of ExecStart, in which systemd would read quotes, backslashes, % and $ itself."""
    text = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%$+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


_FILTERS: dict[str, Callable[..., str]] = {
    "quoted": _quoted,
    "compose_text": lambda text: _quoted(_compose_escaped(text)),
    "compose_words": _words(_compose_escaped),
    "k8s_words": _words(_k8s_escaped),
    "systemd_words": lambda words: " ".join(map(_systemd_word, words)),
    "systemd_path": lambda text: text.replace("%", "%%"),
    "comment": lambda text: "\n".join(f"#   {line}" for line in text.splitlines()),
}
