"""All stages on one's own cases: looked at first, planned, run, repeated over folds, served. Composes bundle runs."""
