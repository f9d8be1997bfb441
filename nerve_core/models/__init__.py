"""Model pairs: their descriptions, where their weight files are, loading them and verifying them."""
