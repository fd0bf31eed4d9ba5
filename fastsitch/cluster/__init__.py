"""Work on many machines through Ray: a connection, workers that hold what they have loaded, and who does what."""
