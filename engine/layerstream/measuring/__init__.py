"""What this machine does per second, and pictures of what a sweep did."""
