"""What training loses and gains by a choice: boundaries, optimizers, staleness, each on equal tokens."""
