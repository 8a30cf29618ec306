"""`bouquet audit`, an attempt to break the promise of a private run on one's own data."""
