"""Write the last table of settings.md from emp_plugin/config/models.py: `python docs/settings.py`."""

import ast
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
SCHEMA = PAGE.parents[1] / "emp_plugin/config/models.py"
MARK = "<!-- The rest is written by docs/settings.py -->\n"
HEAD = "| setting | default | meaning |\n|---|---|---|\n"


def settings(source: str, name: str = "Run", prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every setting; the meaning is its comment in the source."""
    lines = [line.strip() for line in source.splitlines()]
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for base in classes[name].bases:
        yield from settings(source, ast.unparse(base), prefix)
    for item in (node for node in classes[name].body if isinstance(node, ast.AnnAssign)):
        key, kind = f"{prefix}{item.target.id}", ast.unparse(item.annotation)
        if kind in classes:
            yield from settings(source, kind, f"{key}.")
            continue
        default = re.sub(r"^field\(.*?=(lambda: )?(.*)\)$", r"\2", ast.unparse(item.value))
        default = {"MISSING": "", "None": "null", "dict": "{}", "list": "[]"}.get(default, default)
        above = takewhile(lambda line: line.startswith("# "), reversed(lines[: item.lineno - 1]))
        meaning = lines[item.lineno - 1].partition("  # ")[2]
        yield key, default.strip("'"), meaning or " ".join(line[2:] for line in [*above][::-1])


def page() -> str:
    """What settings.md should say."""
    rows = [f"| `{key}` | `{value}` | {why} |\n" for key, value, why in settings(SCHEMA.read_text())]
    return PAGE.read_text().partition(MARK)[0] + MARK + HEAD + "".join(rows).replace("``", "")


if __name__ == "__main__":
    PAGE.write_text(page())
