"""What quantised bytes mean, one file per family of formats."""
