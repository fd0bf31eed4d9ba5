"""Work on many machines through Ray: the connection, a pool of workers, and the queue of their jobs."""
