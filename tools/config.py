"""Describes the keys of a config: `python -m tools.config table` (docs/CONFIG.md), `python -m tools.config schema`
(exps/config.schema.json)."""

import argparse
import json
from collections.abc import Sequence

import models  # noqa: F401  (registers every method, gate, head and growth rule with its keys)
from utils.config.describe import config_schema, config_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables or the schema."""
    parser = argparse.ArgumentParser(prog="python -m tools.config", description="Describe the keys of a config.")
    parser.add_argument("what", choices=["table", "schema"], help="Markdown tables, or JSON Schema for editors")
    what = parser.parse_args(arguments).what
    print(config_table().rstrip() if what == "table" else json.dumps(config_schema(), indent=2))


if __name__ == "__main__":
    main()
