"""Write the last table of settings.md from the schema of a run: `python docs/settings.py`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from emp_plugin.config import Run

PAGE = Path(__file__).with_suffix(".md")
HEAD = "| setting | default | meaning |\n|---|---|---|\n"


def settings(schema: type, prefix: str = "") -> Iterator[str]:
    """A row for every setting; its meaning is the comment in the source, beside or above it."""
    sources = [inspect.getsource(cls) for cls in schema.__mro__ if dataclasses.is_dataclass(cls)]
    lines = [line.strip() for line in "\n".join(sources).splitlines()]
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from settings(field.type, f"{key}.")
            continue
        has_factory = field.default is dataclasses.MISSING
        value = str(field.default_factory() if has_factory else field.default)
        value = {"???": "", "None": "`null`"}.get(value, f"`{value}`")
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        above = [*takewhile(lambda line: line.startswith("# "), reversed(lines[:at]))]
        meaning = re.findall(r"  # (.*)", lines[at]) or [line[2:] for line in reversed(above)]
        yield f"| `{key}` | {value} | {' '.join(meaning)} |\n"


def page() -> str:
    """What settings.md should say."""
    return PAGE.read_text().rpartition(HEAD)[0] + HEAD + "".join(settings(Run))


if __name__ == "__main__":
    PAGE.write_text(page())
