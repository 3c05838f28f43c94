"""Parts of the pages that come from the code, so that they cannot go stale: ``python -m docs.generate`` writes them."""
