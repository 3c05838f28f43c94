"""From what the caller chose to an engine that runs: configuration, plan, store, assembly."""
