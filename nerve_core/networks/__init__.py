"""The networks: CLIP's patch embeddings and a diffusion model's queries Q and keys K of an image."""
