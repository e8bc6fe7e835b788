"""A run's state on disk: what a crash cannot spoil and any number of processes can read."""
