"""What trainings came to: error rates with intervals, where the errors are, rows of the tables."""
