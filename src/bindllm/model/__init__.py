"""The trainable parts and the decoder that they are joined to."""
