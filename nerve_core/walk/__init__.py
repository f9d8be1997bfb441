"""The random walk: affinities of Q and K, the transition S made of them, and P from G along it (Eq. 3-22)."""
