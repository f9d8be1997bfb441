"""An image in, CLIP's patch embeddings and the diffusion model's Q and K out."""
