"""Write the parts of the pages that come from the code: ``python -m docs.generate``."""

from __future__ import annotations

from docs.generate.parts import DOCS, SLOW_PARTS, filled, should_be

for path, text in (should_be() | filled(SLOW_PARTS)).items():
    if not path.exists() or path.read_text("utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        print(f"docs/{path.relative_to(DOCS)} written")
