"""Who this process is: its rank and world size under each launcher (the only readers of their variables), MPI, and
whether it runs the ``adabatch`` command."""
