"""What looks at a step beside its gradient, and what travels on the one reduction."""
