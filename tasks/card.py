"""The model card of an artifact, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorpress.pictures.card import render_card


def card_of(record: Mapping[str, Any]) -> str:
    """The card that a record (the contents of tensorpress.json) gives; without metrics before anything was measured."""
    return render_card(
        {
            "title": record["title"],
            "base": record["base"],
            "chain": record["chain"],
            "metrics": record.get("metrics") or {},
            "recipe_yaml": record["recipe"],
            "how_to_load": "plain" if record["plain_gptq"] else "tensorpress",
            "kind": record["kind"],
            "licence": None,
        }
    )
