"""Q, K and G in, P out: affinities, the transition S and the random walk along it (Eq. 3-22)."""
