"""`bouquet run`: runs on this machine, by Flower's simulation or in one program."""
