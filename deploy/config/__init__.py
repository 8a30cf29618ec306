"""`bouquet config`: what a run is told, and what every key of it means."""
