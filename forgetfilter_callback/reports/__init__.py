"""Reports on a filter result: terminal output, plot, dataset card and review page."""
