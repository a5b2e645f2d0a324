"""Formats the result of a search as a table."""

from __future__ import annotations

from typing import Any

HEAD = ("", "success", "95 % interval", "tokens per prompt", "responses", "seconds per prompt")


def title(result: dict[str, Any]) -> str:
    """The title of the printed table."""
    asked = result["asked"]
    return (
        f"{asked['method']} with {result['checkpoint']} on {asked['prompts']} held-out prompts of {result['task']}, "
        f"value: {asked['value']}"
    )


def cells(result: dict[str, Any]) -> list[list[str]]:
    """The printed table."""
    return [
        [
            row["name"],
            f"{row['success']:.3f}",
            f"{row['low']:.3f} - {row['high']:.3f}",
            f"{row['tokens_per_prompt']:.1f}",
            f"{row['responses_per_prompt']:.1f}",
            f"{row['seconds_per_prompt']:.4f}",
        ]
        for row in result["rows"]
    ]


def sentences(result: dict[str, Any]) -> list[str]:
    """Notes below the table."""
    lines = [
        f"{name}: {d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}, paired, 95 %)"
        for name, d in result["differences"].items()
    ]
    trees = [row for row in result["rows"] if "nodes" in row]
    lines += [
        f"memory of a tree: {row['nodes']:.0f} nodes, at most {row['cache_mb_per_prompt']:.2f} MB of caches"
        for row in trees
    ]
    if trees:
        lines.append(
            "best-of-n was given at least as many generated tokens for each prompt, and less than one response more"
        )
    return [*lines, f"note: {result['note']}"]
