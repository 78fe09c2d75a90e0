"""What training cost and what came of it, kept in one JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lib_dynfuse.demo.loop import Curve


class Record:
    """A file that grows with every stage; read again before each write, for stages may run side by side."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def _put(self, part: str, entries: dict[str, Any]) -> None:
        content = self.read()
        content.setdefault(part, {}).update(entries)
        partial = self.file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.file)

    def setting(self, **values: Any) -> None:
        self._put("settings", values)

    def curve(self, stage: str, curve: Curve, batch: int) -> None:
        """A stage's losses (the mean of every `curve.every` steps), steps, batch and seconds."""
        self._put("stages", {stage: {**vars(curve), "seconds": round(curve.seconds), "batch": batch}})

    def figure(self, name: str, values: Any) -> None:
        """A measured figure."""
        self._put("figures", {name: values})
