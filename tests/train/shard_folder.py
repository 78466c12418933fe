"""A stage's data on disk as a build leaves them, made of given documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openbook.core.files import write_json
from openbook.data.pack import Document, pack, to_arrays
from openbook.data.shards import FORMAT, Manifest, write_shard


def write_shard_folder(folder: Path, stage: str, documents: Sequence[Document], num_rows: int, row_tokens: int) -> None:
    """The first `num_rows` packed rows of the documents, in one shard, and the manifest."""
    rows = list(pack(documents, row_tokens, 16))[:num_rows]
    assert len(rows) == num_rows
    file = write_shard(folder / "rows-00000.safetensors", to_arrays(rows, row_tokens, 0, np.uint16))
    manifest = Manifest(
        format=FORMAT,
        stage=stage,
        seed=0,
        mixture=[],
        documents=len(documents),
        rows=num_rows,
        row_tokens=row_tokens,
        tokens=0,
        trained_tokens=0,
        padding_share=0.0,
        documents_by_task={},
        tokens_by_task={},
        refused={},
        generators={},
        licenses={},
        tokenizer_sha256="",
        files=[file],
    )
    write_json(folder / "manifest.json", manifest)
