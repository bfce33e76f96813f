"""Rank and world size of this process under each launcher: the only readers of their variables; and MPI."""
