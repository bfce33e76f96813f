"""Who this process is, under each launcher: the only readers of its environment variables; and MPI."""
