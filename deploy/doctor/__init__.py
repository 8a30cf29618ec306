"""`bouquet doctor`: whether a machine is fit for a run, before its GPU is busy."""
