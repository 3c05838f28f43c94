"""Time per token of LayerStream and its peers: same model, same prompt, same memory cgroup."""
