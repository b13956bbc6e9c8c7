"""The node's tiny llama, for tests that load it without a node."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(models_dir: Path) -> Path:
    return models_dir / "tiny"
