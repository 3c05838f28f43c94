"""What lives in memory: the keys and values of every sequence, in pages, and which prefixes they hold."""
