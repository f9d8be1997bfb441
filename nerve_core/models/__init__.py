"""A pair's name in, loaded networks out: pairs, their weight files, loading and checking them."""
