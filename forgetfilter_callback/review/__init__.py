"""Review of single rows: verdicts of people, a ranking that learns from them, and estimates of what is left."""
