"""`bouquet chat`: try an adapter in the terminal."""
