"""Reads gradients, feeds data and talks to ranks; decides nothing."""
