"""The model card of an artifact, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tensorpress.pictures.card import render_card
from tensorpress.secrets import redact


def card_of(record: Mapping[str, Any]) -> str:
    """The card that a record (the contents of tensorpress.json) gives; without metrics before anything was measured."""
    return render_card(
        {
            "title": record["title"],
            "base": record["base"],
            "chain": record["chain"],
            "metrics": record.get("metrics") or {},
            "recipe_yaml": redact(record["recipe"]),
            "how_to_load": "plain" if record["plain_gptq"] else "tensorpress",
            "kind": record["kind"],
            "licence": record["licence"],
        }
    )


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's own card names in its front matter, if it has one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        matter = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0]) if text.startswith("---\n") else {}
        name = matter.get("license")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return name if isinstance(name, str) else None
