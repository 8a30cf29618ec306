"""`bouquet chat`: an adapter tried in the terminal."""
