"""The verbs, one a line: python -m experiments."""

import ast
from pathlib import Path


def summary() -> str:
    """Every entry point and the first line of its text; nothing is imported."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    first = {path.stem: ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] for path in files}
    return "\n".join(f"python -m experiments.{verb:<10}{line}" for verb, line in first.items())


if __name__ == "__main__":
    print(summary())
