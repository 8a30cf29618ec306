"""`bouquet config`: the settings of a run, and what every key means."""
