"""Image output: embeddings of any media, drawn by an unCLIP pipeline of diffusers."""
