"""Writes docs/chart-values.md from the chart's schema and defaults.

.venv/bin/python charts/cxr-serve/ci/values_page.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1]
PAGE = CHART.parents[1] / "docs" / "chart-values.md"

HEAD = """# Values of the chart

<!-- Written by charts/cxr-serve/ci/values_page.py from values.schema.json: change that. -->

What is not listed here is refused by name, when the chart is rendered.

| value | type | default | |
|---|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    rows = (
        f"| `{name}` | {kind} | {default} | {text} |\n"
        for name, kind, default, text in leaves(schema["properties"], defaults)
    )
    return HEAD + "".join(rows)


def leaves(
    properties: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of each value; groups are one row without a type."""
    for key, schema in properties.items():
        text = schema["description"].replace("|", "\\|")
        if "properties" in schema:
            yield prefix + key, "", "", f"**{text}**"
            yield from leaves(schema["properties"], defaults[key], f"{prefix}{key}.")
        else:
            default = f"`{json.dumps(defaults[key])}`" if key in defaults else ""
            yield prefix + key, kind(schema), default.replace("|", "\\|"), text


def kind(schema: dict[str, Any]) -> str:
    """The type in words."""
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(kind(choice) for choice in schema["anyOf"])
    kinds = schema.get("type", "refused")
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    return f"list of {kind(schema['items'])}s" if words == "array" else words


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
