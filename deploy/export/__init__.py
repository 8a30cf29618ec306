"""`bouquet export`: a run's adapter in the form that others load."""
