"""Snapshots in a hub cache, made without a hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

COMMIT = "a" * 40


def cached(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """A snapshot as `huggingface_hub` lays it out: links into `blobs`, and `main` as the ref that names the commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, data in files.items():
        blob, link = folder / "blobs" / hashlib.sha1(data).hexdigest(), folder / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(commit)
    return folder / "snapshots" / commit
