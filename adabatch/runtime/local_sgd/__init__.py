"""Local SGD: workers take several steps on their own, and then average their parameters."""
