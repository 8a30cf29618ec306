"""`bouquet export`: a run's adapter in a form that other programs load."""
