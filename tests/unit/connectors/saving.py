"""A model is saved into a place, and looked at there."""

from __future__ import annotations

from pathlib import Path

from sglang_hicache.connectors.base import BaseWeightConnector
from sglang_hicache.connectors.manifest import CHUNKS
from sglang_hicache.connectors.stored_model import StoredModel
from sglang_hicache.connectors.upload import Saved, Upload
from sglang_hicache.connectors.upload_source import FolderSource, Source
from tests.unit.connectors.conftest import CHUNK_BYTES, SAVED


def save(source: Path | Source, place: BaseWeightConnector, *, overwrite: bool = False) -> Saved:
    if isinstance(source, Path):
        source = FolderSource(str(source), CHUNK_BYTES)
    return Upload(source, place, lambda written, skipped: None, overwrite=overwrite).run_blocking()


def contents(place: BaseWeightConnector) -> dict[str, bytes]:
    """Every file of the model that is there, as a reader gets it."""
    manifest = place.manifest_blocking()
    assert manifest is not None
    model = StoredModel(place, manifest)
    return {file.name: model.read_file_blocking(file, file.size_bytes) for file in manifest.files}


def of_folder(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAVED}


def chunks(place: BaseWeightConnector) -> list[str]:
    return sorted(entry.key for entry in place.entries_blocking(CHUNKS))
