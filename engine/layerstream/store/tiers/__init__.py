"""Where pages outlive the process: the interface, and the local disk."""
