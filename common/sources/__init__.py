"""Where examples come from: one reader for every file, and how records are divided among nodes."""
