"""Names in, query embeddings out: the vocabulary's rules, prompt templates, CLIP's text encoder and its cache."""
